"""A step that does not log reads nothing back from the device on its own account."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import megadpo
from tests.helpers.host_reads import HostReads
from tests.helpers.jobs.training import host_reads_of_a_step
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 1),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
    ],
)
def test_reads_are_found(read: Callable[[torch.Tensor], object]) -> None:
    with HostReads() as reads:
        values = torch.ones(3) + 1
        assert reads.files == []
        read(values)
    assert [file.rpartition(":")[0] for file in reads.files] == [__file__] * len(reads.files)
    assert reads.files


@pytest.mark.path_dependent
def test_a_step_that_does_not_log_reads_nothing_of_ours(tmp_path: Path) -> None:
    """Megatron reads the gradient norm, and right behind it what was queued before; the logged step reads our sums."""
    words = [
        "+model=hf",
        f"model.hf_path={write_tiny_model(tmp_path / 'model', 'llama', num_layers=2)}",
        f"data.train_path={write_jsonl(tmp_path / 'pairs.jsonl', make_pairs(12, seed=3))}",
        f"train.run_dir={tmp_path / 'run'}",
        *("precision.dtype=fp32", "device.kind=cpu", "trackers=[jsonl]"),
        *("train.max_steps=3", "train.log_every=3", "train.global_batch_size=4", "data.tokens_per_microbatch=600"),
    ]
    ((silent, logged),) = launch(1, host_reads_of_a_step, words, 2)
    package = str(Path(megadpo.__file__).parent) + os.sep
    (norm,) = (place for place, file in enumerate(silent) if "/clip_grads.py:" in file)
    # Queued before the norm, so that nobody waits for it.
    assert silent[norm + 1].startswith(f"{package}optimizer/guarded_update.py:")
    assert [file for file in silent if file.startswith(package)] == [silent[norm + 1]]
    assert any(file.startswith(f"{package}metrics/reduction.py:") for file in logged)
