"""The description inside a checkpoint, read back and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.checkpoint.description import (
    metrics_of,
    stored_dtype,
    stored_vocab_size,
    trained_setting,
)
from megadpo.checkpoint.directory import Retention, step_directory
from megadpo.errors import CheckpointError
from tests.helpers.training_states import imported, trained


def test_a_checkpoint_says_the_format_of_its_weights(tmp_path: Path) -> None:
    assert stored_dtype(trained(tmp_path / "a", dtype="bf16")) == "bf16"
    assert stored_dtype(imported(tmp_path / "b")) == "fp32"
    assert stored_vocab_size(tmp_path / "a") == stored_vocab_size(tmp_path / "b") == 401


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"can't be read \(Expecting property name"),
        (b"\xff{}", r"can't be read \('utf-8' codec can't decode byte 0xff"),
        (b"[1]", r"must hold source \(str\), dtype \(str\), vocab_size \(int\), megadpo_version \(str\): it is"),
        (b'{"source": "x", "dtype": "fp32"}', r"must hold .*or was written by another version"),
        (b'{"source": "x", "dtype": "fp32", "vocab_size": "8", "megadpo_version": "0"}', r"must hold .*is damaged"),
        (b'{"source": "x", "dtype": "fp8", "vocab_size": 8, "megadpo_version": "0"}', r"'fp8', it must be bf16 or fp"),
    ],
)
def test_a_damaged_description_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    imported(tmp_path / "x")
    (tmp_path / "x" / "imported.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"imported\.json:? .*{message}.*: name another checkpoint, or copy"):
        stored_dtype(tmp_path / "x")


def test_a_setting_that_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"training\.json: its settings lack model\.name: name another"):
        trained_setting(trained(tmp_path / "x"), "model.name")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b'{"eval/loss": null}', b'{"eval/loss": "low"}'])
def test_a_later_evaluation_that_cannot_be_read_counts_as_none(content: bytes, tmp_path: Path) -> None:
    checkpoint = trained(step_directory(tmp_path, 1))
    (checkpoint / "evaluation.json").write_bytes(content)
    assert metrics_of(checkpoint) == {}
    assert Retention(last=1, best="eval/loss").dropped(tmp_path) == []
