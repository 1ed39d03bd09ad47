"""Interrupted and resumed = uninterrupted: bit for bit in one layout, to rounding in another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.jobs.training import train
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import (
    assert_bit_equal,
    assert_same_trajectory,
    exported_weights,
    metrics,
    numbers,
    write_jsonl,
)
from tests.helpers.tiny_models import write_tiny_model

LR = 1e-3


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


def write_inputs(root: Path) -> list[str]:
    """Words of a six-step run over two and a half epochs that saves every third; everything but layout and precision.

    The model is tied, so that the embedding's gradients have a bucket of their own on the outer pipeline stages, and
    its sizes are no multiples of 128, so that buckets are padded: a checkpoint must not lose count over the padding.
    """
    model = write_tiny_model(root / "model", "qwen2", tied=True, hidden=72, heads=2, kv_heads=1)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(15, seed=11))
    return [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={data}",
        "data.validation_fraction=0.2",
        "data.tokens_per_microbatch=700",
        "device.kind=cpu",
        "train.max_steps=6",
        "train.global_batch_size=5",
        "train.save_every=3",
        "checkpoint.keep_last=3",
        f"optimizer.lr={LR}",
        "optimizer.weight_decay=0.01",
        "optimizer.warmup_steps=2",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An uninterrupted fp32 run on pp2·dp2."""
    root = tmp_path_factory.mktemp("resume")
    common = [*write_inputs(root), "precision.dtype=fp32"]
    launch(4, train, [*common, "parallel.pipeline=2", f"train.run_dir={root / 'whole'}"])
    return root, common


def test_resumed_run_is_bit_equal(whole: tuple[Path, list[str]]) -> None:
    root, common = whole
    interrupt_at(root / "whole", root / "resumed", 3)
    words = [*common, "parallel.pipeline=2", f"train.run_dir={root / 'resumed'}", "train.resume=auto"]
    launch(4, train, words)
    assert_bit_equal(root / "whole", root / "resumed")
    assert not (root / "resumed" / "checkpoints" / ".step_00000099.partial").exists()


@pytest.mark.parametrize(
    "layout",
    [["parallel.tensor=2"], ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]],
    ids=["tp2", "pp2_vpp2"],
)
def test_resumed_bf16_run_is_bit_equal(layout: list[str], tmp_path: Path) -> None:
    """bf16 keeps fp32 main weights, which the checkpoint must bring back: the weights alone would have lost bits."""
    words = [*write_inputs(tmp_path), *layout, "precision.dtype=bf16"]
    launch(2, train, [*words, f"train.run_dir={tmp_path / 'whole'}"])
    interrupt_at(tmp_path / "whole", tmp_path / "resumed", 3)
    launch(2, train, [*words, f"train.run_dir={tmp_path / 'resumed'}", "train.resume=auto"])
    assert_bit_equal(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize(("name", "world", "layout"), [("tp2", 2, ["parallel.tensor=2"]), ("one", 1, [])])
def test_resumes_on_another_layout(name: str, world: int, layout: list[str], whole: tuple[Path, list[str]]) -> None:
    root, common = whole
    interrupt_at(root / "whole", root / name, 3)
    launch(world, train, [*common, *layout, f"train.run_dir={root / name}", "train.resume=auto"])
    assert_same_trajectory(root / "whole", root / name, lr=LR)


def test_resumes_on_two_ranks_and_then_on_four_again(whole: tuple[Path, list[str]]) -> None:
    """From pp2·dp2 at an epoch's end to tp2, and from there to tp2·pp2, with evaluations in between."""
    root, common = whole
    interrupt_at(root / "whole", root / "two", 3)
    between = ["train.save_every=1", "train.eval_every=2", "train.resume=auto"]
    launch(2, train, [*common, *between, "parallel.tensor=2", f"train.run_dir={root / 'two'}"])
    interrupt_at(root / "two", root / "four", 4)
    layout = ["parallel.tensor=2", "parallel.pipeline=2"]
    launch(4, train, [*common, *between, *layout, f"train.run_dir={root / 'four'}"])
    assert_same_trajectory(root / "whole", root / "four", lr=LR)


def test_a_run_killed_before_its_export_is_exported(whole: tuple[Path, list[str]]) -> None:
    """Nothing is left to train: the checkpoint is loaded, in another layout here, and exported as it is."""
    root, common = whole
    interrupt_at(root / "whole", root / "unexported", 6)
    launch(2, train, [*common, "parallel.tensor=2", f"train.run_dir={root / 'unexported'}", "train.resume=auto"])
    before, after = exported_weights(root / "whole"), exported_weights(root / "unexported")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert numbers(root / "unexported") == numbers(root / "whole")
    assert "Trained for 6 steps" in (root / "unexported" / "hf" / "README.md").read_text()


def test_a_checkpoint_that_lacks_a_file_is_named(whole: tuple[Path, list[str]]) -> None:
    root, common = whole
    interrupt_at(root / "whole", root / "torn", 3)
    next((root / "torn" / "checkpoints" / "step_00000003").glob("*.distcp")).unlink()
    said = r"(?s)CheckpointError: train.resume=auto: no checkpoint of .*torn is whole; .*step_0+3: .*distcp is missing"
    with pytest.raises(RuntimeError, match=said):
        launch(1, train, [*common, f"train.run_dir={root / 'torn'}", "train.resume=auto"])


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
    words = [*common, f"train.run_dir={tmp_path}", "train.save_every=1", "checkpoint.keep_last=2"]
    launch(1, train, words)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000005", "step_00000006"]
    for inside in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "checkpoints" / "step_00000006" / "hf" / inside).is_file()

    back = f"train.resume={tmp_path / 'checkpoints' / 'step_00000005'}"
    with pytest.raises(RuntimeError, match="also holds step_00000006, which would be mixed up"):
        launch(1, train, [*words, back])

    before = exported_weights(tmp_path)
    launch(1, train, [*words, "train.resume=auto", "train.max_steps=7"])
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    after = exported_weights(tmp_path)
    # The longer run's export, not the old one.
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_warm_up_that_never_ends_is_refused(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, common = whole
    words = [*common, f"train.run_dir={tmp_path}", "train.max_steps=null", "optimizer.warmup_steps=3"]
    with pytest.raises(RuntimeError, match="warmup_steps=3: must be below the run's 3 steps"):
        launch(1, train, words)
