"""The head's own way of adding up its gradient keeps Megatron's promises: overlapped communication changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.jobs import train
from tests.helpers.launch import launch
from tests.helpers.overlap_jobs import train_overlapped
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_same_trajectory, write_jsonl
from tests.helpers.tiny_models import write_tiny_model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_overlapped_communication_changes_nothing(tied: bool, tmp_path: Path) -> None:
    words = [
        "+model=hf",
        f"model.hf_path={write_tiny_model(tmp_path / 'model', 'llama', num_layers=2, tied=tied)}",
        f"data.train_path={write_jsonl(tmp_path / 'pairs.jsonl', make_pairs(24, seed=5))}",
        "data.tokens_per_microbatch=300",
        "precision.dtype=fp32",
        "device.kind=cpu",
        "trackers=[jsonl]",
        "train.max_steps=3",
        "train.global_batch_size=8",
        "optimizer.lr=1e-3",
        "optimizer.schedule=constant",
    ]
    launch(2, train, [*words, f"train.run_dir={tmp_path / 'plain'}"])
    launch(2, train_overlapped, [*words, f"train.run_dir={tmp_path / 'overlapped'}"], 3)
    assert_same_trajectory(tmp_path / "plain", tmp_path / "overlapped", lr=1e-3)
