"""One trajectory in every layout: parallelism changes where a number is computed, not the number."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from tests.helpers.jobs.training import train, train_with_a_skewed_reference
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_same_trajectory, training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

LR = 1e-3
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2_without_sp": (2, ["parallel.tensor=2", "parallel.sequence_parallel=false"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2_vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "dp2": (2, []),
    "tp2_pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tp2_dp2": (4, ["parallel.tensor=2"]),
}
FURTHER_LAYOUTS = {
    "tp4": (4, ["parallel.tensor=4"]),  # more ranks than key-value heads
    "pp4": (4, ["parallel.pipeline=4"]),
    "tp2_pp2_vpp2": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


def overrides(model: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    """A 5-step fp32 run on CPU, with clipping active and several microbatches a step."""
    return [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={data}",
        f"train.run_dir={run_dir}",
        "precision.dtype=fp32",
        "device.kind=cpu",
        "trackers=[jsonl]",
        "train.max_steps=5",
        "train.global_batch_size=6",
        f"optimizer.lr={LR}",
        "optimizer.weight_decay=0.01",
        "optimizer.schedule=constant",
        *more,
    ]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tied Qwen3 (qk-norm, wide heads) and pairs of our own."""
    root = tmp_path_factory.mktemp("generated")
    model = write_tiny_model(root / "model", "qwen3", tied=True, head_dim=32)
    return model, write_jsonl(root / "pairs.jsonl", make_pairs(24, seed=5))


@pytest.fixture(scope="module")
def real() -> Path:
    directory = os.environ.get("MEGADPO_TEST_DATA")
    if directory is None:
        pytest.skip("MEGADPO_TEST_DATA does not name a directory with dpo_en_demo.json")
    return Path(directory) / "dpo_en_demo.json"


@pytest.fixture(scope="module")
def real_runs(real: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A random Llama and the one-rank run on real pairs, which every layout is compared with."""
    root = tmp_path_factory.mktemp("real")
    model = write_tiny_model(root / "model", "llama", vocab_size=1009)
    common = overrides(model, real, root / "one", "data.max_length=256", "data.tokens_per_microbatch=900")
    launch(1, train, common)
    return common, root


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_trajectory_on_real_pairs(name: str, real_runs: tuple[list[str], Path]) -> None:
    common, root = real_runs
    world, layout = LAYOUTS[name]
    launch(world, train, [*common, f"train.run_dir={root / name}", *layout])
    assert_same_trajectory(root / "one", root / name, lr=LR)


@pytest.fixture(scope="module")
def generated_one(generated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    root = tmp_path_factory.mktemp("runs")
    common = overrides(*generated, root / "one", "data.tokens_per_microbatch=600", "train.max_steps=3")
    launch(1, train, common)
    return common, root


@pytest.mark.parametrize("name", [*LAYOUTS, *FURTHER_LAYOUTS])
def test_same_trajectory_on_generated_pairs(name: str, generated_one: tuple[list[str], Path]) -> None:
    common, root = generated_one
    world, layout = {**LAYOUTS, **FURTHER_LAYOUTS}[name]
    launch(world, train, [*common, f"train.run_dir={root / name}", *layout])
    assert_same_trajectory(root / "one", root / name, lr=LR)


def test_one_pair_a_step(generated: tuple[Path, Path], tmp_path: Path) -> None:
    """A rank without a pair, and an interleaved pipeline filled up with empty microbatches."""
    common = overrides(*generated, tmp_path / "one", "train.global_batch_size=1", "train.max_steps=2")
    launch(1, train, common)
    for name in ("dp2", "pp2_vpp2"):
        world, layout = LAYOUTS[name]
        launch(world, train, [*common, f"train.run_dir={tmp_path / name}", *layout])
        assert_same_trajectory(tmp_path / "one", tmp_path / name, lr=LR)
    # The pipeline's messages have another length in each step: one pair and one filler of its width.
    first, second = training_lines(tmp_path / "pp2_vpp2")
    assert first["tokens/computed"] != second["tokens/computed"]
    assert first["tokens/padding"] == second["tokens/padding"] == 0.5


def test_bf16_starts_at_ln_2_and_agrees_over_layouts(generated: tuple[Path, Path], tmp_path: Path) -> None:
    """bf16 rounds the log-probs, but policy and reference alike: rewards are exactly 0 before the first update."""
    common = overrides(*generated, tmp_path / "one", "precision.dtype=bf16", "data.tokens_per_microbatch=256")
    launch(1, train, common)
    first_norm = training_lines(tmp_path / "one")[0]["grad_norm"]
    for name in ("tp2_pp2", "dp2"):
        world, layout = LAYOUTS[name]
        launch(world, train, [*common, f"train.run_dir={tmp_path / name}", *layout])
    for name in ("one", "tp2_pp2", "dp2"):
        lines = training_lines(tmp_path / name)
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert lines[0]["rewards/chosen"] == lines[0]["rewards/rejected"] == 0.0
        assert lines[0]["grad_norm"] == pytest.approx(first_norm, rel=3e-2)
        assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_reference_that_is_not_the_policy_stops_the_run(generated: tuple[Path, Path], tmp_path: Path) -> None:
    """The loss of step 1 gives away what no later number would: here 5e-6 of a loss that must be ln 2."""
    words = overrides(*generated, tmp_path / "run")
    with pytest.raises(
        RuntimeError, match=r"step 1: the loss is 0\.693152\d+; .* must be 0\.693147181 .*Nothing was saved"
    ):
        launch(2, train_with_a_skewed_reference, [*words, "parallel.pipeline=2"])
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "hf").exists()
