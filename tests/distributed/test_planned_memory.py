"""The planner against launches: the memory that ranks really take, and a dry run of tools/train.py."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megadpo.planner import make_plan
from tests.helpers.jobs.planning import dry_run, end_left_world, measured_peak
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # as `python tools/bench/planner.py` has it

from bench.peak_child import PeakCase

# Beyond this a prediction is wrong; tools/bench/planner.py holds a larger model to the same.
TOLERANCE = 0.15
SMALL: dict[str, Any] = {"hidden": 96, "layers": 4, "ffn": 256, "vocab": 1024, "pairs": 12, "budget": 512}
CASES = [
    PeakCase(name="one rank, bf16", dtype="bf16", **SMALL),
    PeakCase(name="dp2, gradients in bf16", data=2, dtype="bf16", grad_reduce_in_fp32=False, **SMALL),
    PeakCase(name="tp2, feed-forward recomputed", tensor=2, recompute="mlp", **SMALL),
    PeakCase(name="pp2, uneven, recomputed", pipeline=2, first_stage_layers=3, recompute="full", **SMALL),
    PeakCase(name="pp2 x vpp2", pipeline=2, virtual_pipeline=2, **SMALL),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensors_take_what_was_planned(case: PeakCase) -> None:
    end_left_world()
    measured = launch(case.layout.world_size, measured_peak, case)
    plan = make_plan(case.job())
    for stage in plan.stages:
        peak = max(rank["tensor_bytes"] for rank in measured if rank["stage"] == stage.stage)
        assert stage.peak == pytest.approx(peak, rel=TOLERANCE)
        assert stage.always < peak


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's configuration and tokenizer without its weights, and pairs."""
    root = tmp_path_factory.mktemp("dry")
    whole = write_tiny_model(root / "whole", "llama")
    model = root / "model"
    shutil.copytree(whole, model, ignore=shutil.ignore_patterns("*.safetensors"))
    return model, write_jsonl(root / "pairs.jsonl", make_pairs(24, seed=5))


def words(files: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    model, data = files
    return [
        *("+model=hf", f"model.hf_path={model}", f"data.train_path={data}", f"train.run_dir={run_dir}"),
        *("train.dry_run=true", "train.global_batch_size=6", "data.tokens_per_microbatch=400", "device.kind=cpu"),
        *("parallel.tensor=2", "parallel.pipeline=2", *more),
    ]


def test_a_dry_run_plans_the_launch_and_reads_no_weights(files: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (status, out, err), *others = launch(4, dry_run, words(files, run_dir))
    assert status == 0 and [rank[0] for rank in others] == [0] * 3, err
    assert "on 4 x ranks: tp2 x pp2 x dp1, sequence parallel" in out and "Pairs: the data." in out
    assert re.search(r"microbatches of a rank *│ \d+ of \d+ tokens", out) and "fits" not in out
    assert all(rank[1] == "" for rank in others)
    assert [path.name for path in run_dir.iterdir()] == ["tokens"]
    # A card that is too small for it is told by rank 0 alone, which is enough for the launcher.
    small = words(files, run_dir, "cluster.gpu=tiny", "cluster.memory_gib=2.001")
    (status, out, err), *others = launch(4, dry_run, small)
    assert status == 2 and [rank[0] for rank in others] == [0] * 3
    assert "tp2 x pp2 x dp1 does not fit: a rank of stage 0 needs 2.00 GiB, the card (tiny) has 2.001 GiB" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["cluster.gpus=8"], "cluster.gpus=8: has no effect here: a dry run has the launch's ranks"),
        (["plan.prompt_tokens=8"], "plan.prompt_tokens=8: has no effect here: a dry run has"),
        (["train.dry_run=false", "cluster.gpu=h100"], "cluster.gpu=h100: has no effect here: it is for tools/plan.py"),
        (["+model=llama3_8b", "model.hf_path=null"], "the data are read with its tokenizer: give model.hf_path=DIR"),
    ],
)
def test_settings_that_a_launch_does_not_read_are_refused(
    files: tuple[Path, Path], tmp_path: Path, more: list[str], says: str
) -> None:
    given = words(files, tmp_path / "run", *more)
    if any(word.startswith("+model") for word in more):
        given = [word for word in given if word != "+model=hf"]
    ((status, _, err),) = launch(1, dry_run, [word for word in given if not word.startswith("parallel.")])
    assert status == 2 and says in err and not (tmp_path / "run").exists()
