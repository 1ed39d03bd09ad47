"""The checks that tests/gpu makes on CUDA hold on a CPU, so that what runs there has run before."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.device_checks import check_command, check_resuming, check_scores, check_training


def test_scores_in_bf16(tmp_path: Path) -> None:
    check_scores(tmp_path, "cpu", torch.bfloat16, {"attention": "sdpa"})


def test_training_in_two_ranks(tmp_path: Path) -> None:
    check_training(tmp_path, "cpu", ["precision.dtype=bf16"], loss=2.5e-2, norm=5e-2, world=2)


def test_resuming(tmp_path: Path) -> None:
    check_resuming(tmp_path, "cpu", ["precision.dtype=bf16"], tolerance=0.0)


def test_the_command(tmp_path: Path) -> None:
    check_command(tmp_path, "cpu")
