"""Interrupted and resumed = uninterrupted: bit for bit in one layout, to rounding in another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.jobs import compare_checkpoints, train
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_same_trajectory, exported_weights, metrics, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

LR = 1e-3
PP2_DP2 = (4, ["parallel.pipeline=2"])


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that don't depend on the machine's mood."""
    moody = ("time/", "throughput/", "memory/", "eval/time")
    return [{k: v for k, v in line.items() if not k.startswith(moody)} for line in metrics(run_dir)]


def interrupt_at(run_dir: Path, copy: Path, step: int) -> None:
    """Leaves in `copy` what a run killed after the checkpoint of `step` leaves: a torn line, an unfinished save."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "hf")
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (copy / "checkpoints" / ".step_00000099.partial").mkdir()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An uninterrupted run of six steps over two and a half epochs, bf16-free, saving every third."""
    root = tmp_path_factory.mktemp("resume")
    model = write_tiny_model(root / "model", "qwen2", tied=True)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(15, seed=11))
    common = [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={data}",
        "data.validation_fraction=0.2",
        "data.tokens_per_microbatch=128",
        "precision.dtype=fp32",
        "device.kind=cpu",
        "train.max_steps=6",
        "train.global_batch_size=5",
        "train.save_every=3",
        "checkpoint.keep_last=3",
        f"optimizer.lr={LR}",
        "optimizer.weight_decay=0.01",
        "optimizer.warmup_steps=2",
    ]
    world, layout = PP2_DP2
    launch(world, train, [*common, *layout, f"train.run_dir={root / 'whole'}"])
    return root, common


def test_resumed_run_is_bit_equal(whole: tuple[Path, list[str]]) -> None:
    root, common = whole
    interrupt_at(root / "whole", root / "resumed", 3)
    world, layout = PP2_DP2
    launch(world, train, [*common, *layout, f"train.run_dir={root / 'resumed'}", "train.resume=auto"])
    assert numbers(root / "resumed") == numbers(root / "whole")
    before, after = exported_weights(root / "whole"), exported_weights(root / "resumed")
    assert all(torch.equal(before[name], after[name]) for name in before)
    name = "step_00000006"
    ((names, different),) = launch(
        1, compare_checkpoints, *(str(root / run / "checkpoints" / name) for run in ("whole", "resumed"))
    )
    assert different == []
    assert any("exp_avg_sq" in tensor for tensor in names)
    assert not (root / "resumed" / "checkpoints" / ".step_00000099.partial").exists()
    assert (root / "resumed" / "checkpoints" / "latest").read_text().strip() == name


@pytest.mark.parametrize(("name", "world", "layout"), [("tp2", 2, ["parallel.tensor=2"]), ("one", 1, [])])
def test_resumes_on_another_layout(name: str, world: int, layout: list[str], whole: tuple[Path, list[str]]) -> None:
    root, common = whole
    interrupt_at(root / "whole", root / name, 3)
    launch(world, train, [*common, *layout, f"train.run_dir={root / name}", "train.resume=auto"])
    assert_same_trajectory(root / "whole", root / name, lr=LR)


def test_resuming_a_finished_run_changes_nothing(whole: tuple[Path, list[str]]) -> None:
    root, common = whole

    def snapshot() -> dict[str, tuple[int, int]]:
        files = [path for path in (root / "whole").rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = snapshot()
    launch(1, train, [*common, f"train.run_dir={root / 'whole'}", "train.resume=auto"])
    assert snapshot() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.global_batch_size=4", "train.global_batch_size=4: the checkpoint was written with 5"),
        ("data.max_length=40", "the training pairs differ from the checkpoint's"),
        ("train.resume=never", "must be empty with train.resume=never"),
    ],
)
def test_refuses_to_resume_another_run(change: str, message: str, whole: tuple[Path, list[str]]) -> None:
    root, common = whole
    with pytest.raises(RuntimeError, match=message):
        launch(1, train, [*common, f"train.run_dir={root / 'whole'}", "train.resume=auto", change])


def test_keeps_the_newest_checkpoints(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, common = whole
    launch(1, train, [*common, f"train.run_dir={tmp_path}", "train.save_every=1", "checkpoint.keep_last=2"])
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000005", "step_00000006"]
