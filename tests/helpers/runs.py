"""Reads what a run left behind, and compares two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.jobs.training import compare_checkpoints
from tests.helpers.launch import launch


def metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def training_lines(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of training steps, without those of evaluations."""
    return [line for line in metrics(run_dir) if "loss" in line]


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that don't depend on the machine's mood."""
    moody = ("time/", "throughput/", "memory/", "eval/time")
    return [{k: v for k, v in line.items() if not k.startswith(moody)} for line in metrics(run_dir)]


def exported_weights(run_dir: str | Path) -> dict[str, torch.Tensor]:
    """The exported model's weights."""
    return load_file(Path(run_dir) / "hf" / "model.safetensors")


def assert_bit_equal(expected: Path, actual: Path) -> None:
    """Fails unless two runs have the same metrics, hints, weights and last checkpoint, moments and main weights too."""
    assert numbers(actual) == numbers(expected)
    assert (actual / "health.json").read_text() == (expected / "health.json").read_text()
    before, after = exported_weights(expected), exported_weights(actual)
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = (expected / "checkpoints" / "latest").read_text().strip()
    assert (actual / "checkpoints" / "latest").read_text().strip() == last
    ((names, different),) = launch(
        1, compare_checkpoints, *(str(run / "checkpoints" / last) for run in (expected, actual))
    )
    assert different == []
    assert any("exp_avg_sq" in tensor for tensor in names)


def assert_same_trajectory(expected: str | Path, actual: str | Path, *, lr: float, ties: bool = False) -> None:
    """Fails unless two fp32 runs agree to the tolerances that every layout is held to.

    Loss 1e-5; gradient norm and log-probs 1e-4 relative; weights 1e-5 in the whole model's relative norm, with no
    element off by more than lr/5 (Adam turns rounding on near-zero gradients into lone larger steps). With `ties` the
    first step's rewards are 0 but for rounding in one of them, which then decides its accuracy.
    """
    lines = list(zip(training_lines(expected), training_lines(actual), strict=True))
    assert lines
    for a, b in lines:
        where = f"step {a['step']}"
        assert a["step"] == b["step"]
        assert abs(a["loss"] - b["loss"]) <= 1e-5, where
        for key in ("grad_norm", "logps/chosen", "logps/rejected"):
            assert abs(a[key] - b[key]) <= 1e-4 * abs(a[key]), f"{where}: {key} {a[key]} {b[key]}"
        for key in ("lr", "epoch", "pairs", "tokens", "lengths/chosen", "rewards/accuracies", "logps/accuracies"):
            is_tie = ties and a["step"] == 1 and key == "rewards/accuracies"
            assert is_tie or a[key] == b[key], f"{where}: {key}"
        if a["step"] > 1:  # before, margins are 0 but for rounding
            correlations = [line.get("rewards/length_correlation") for line in (a, b)]
            assert correlations[0] == pytest.approx(correlations[1], abs=1e-3), where
    assert_close_weights(exported_weights(expected), exported_weights(actual), largest=lr / 5)


def assert_same_evaluations(expected: str | Path, actual: str | Path) -> None:
    """Fails unless two fp32 runs evaluated after the same updates and saw the same: loss 1e-5, log-probs 1e-4."""
    lines = [[line for line in metrics(run) if "eval/loss" in line] for run in (expected, actual)]
    assert len(lines[0]) > 1
    for a, b in zip(*lines, strict=True):
        assert (a["step"], a["eval/pairs"]) == (b["step"], b["eval/pairs"])
        assert abs(a["eval/loss"] - b["eval/loss"]) <= 1e-5, f"after step {a['step']}"
        for key in ("eval/logps/chosen", "eval/logps/rejected"):
            assert abs(a[key] - b[key]) <= 1e-4 * abs(a[key]), f"after step {a['step']}: {key} {a[key]} {b[key]}"


def assert_close_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, largest: float) -> None:
    """Fails unless the weights agree to 1e-5 of the model's norm and no element differs by more than `largest`."""
    assert a.keys() == b.keys()
    squared = sum(float((a[k].double() - b[k].double()).pow(2).sum()) for k in a)
    norm = sum(float(a[k].double().pow(2).sum()) for k in a)
    assert (squared / norm) ** 0.5 <= 1e-5
    assert max(float((a[k].double() - b[k].double()).abs().max()) for k in a) <= largest


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes one JSON object a line; the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
