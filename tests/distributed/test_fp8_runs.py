"""FP8 in emulation: what each recipe may do to a model, and runs through the front door."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.helpers.jobs.fp8 import (
    Gates,
    gates,
    refusal_of_a_plain_reference,
    refusal_of_layers_left_out,
    train_and_log,
)
from tests.helpers.jobs.training import train
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import metrics, numbers, training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]
STEPS = 25
EMULATED = "precision.fp8_backend=emulate"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 128 values fit its width, and weights have the size that trained ones have."""
    return write_tiny_model(
        tmp_path_factory.mktemp("fp8") / "model",
        "llama",
        hidden=128,
        head_dim=32,
        dtype=torch.bfloat16,
        initializer_range=0.02,
    )


@pytest.fixture(scope="module")
def words(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_pairs(12, seed=7))
    return [
        *("+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "data.tokens_per_microbatch=512"),
        *("trackers=[jsonl]", "train.max_steps=3", "train.global_batch_size=6", "optimizer.lr=1e-4", EMULATED),
    ]


@pytest.fixture(scope="module")
def found(model: Path) -> dict[str, Gates]:
    first, second = launch(2, gates, str(model), RECIPES, STEPS)
    return {**first, **second}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_keeps_to_its_gates(recipe: str, found: dict[str, Gates]) -> None:
    gate = found[recipe]
    assert gate.first_loss == pytest.approx(math.log(2), abs=1e-6)
    assert 1e-3 < gate.logps_rms <= 3e-2
    assert 0.99 <= gate.cosine < 1 - 1e-5
    assert 0 < gate.loss_gap <= 2.5e-2


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_monitor_says_what_fp8_does_to_margins(recipe: str, found: dict[str, Gates]) -> None:
    gate = found[recipe]
    assert gate.checked["margin_error"] == pytest.approx(sum(gate.errors) / len(gate.errors), rel=1e-5)
    assert gate.checked["margin_error_max"] == pytest.approx(max(gate.errors), rel=1e-5)
    assert gate.checked["policy_margin_error"] > 0 < gate.checked["margin_error"]


@pytest.fixture(scope="module")
def one_rank(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Words of a run in fp32 but for FP8, whose blocks lie within a tensor rank's part; and that run on one rank."""
    run = tmp_path_factory.mktemp("layouts") / "one_rank"
    words = [
        *(*words, "precision.fp8=mxfp8", "precision.dtype=fp32", "precision.num_layers_at_start_in_bf16=1"),
        *("precision.fp8_check_every=2", "precision.fp8_check_pairs=5"),
    ]
    launch(1, train, [*words, f"train.run_dir={run}"])
    return words, run


@pytest.mark.parametrize(
    ("layout", "multiple"),
    [
        (["parallel.tensor=2"], 64),  # 32 values on each of two ranks
        (["parallel.tensor=2", "parallel.sequence_parallel=false"], 32),
        (["parallel.pipeline=2"], 32),
    ],
    ids=["tp2", "tp2_without_sequence_parallelism", "pp2"],
)
def test_layouts_compute_the_same(
    layout: list[str], multiple: int, one_rank: tuple[list[str], Path], tmp_path: Path
) -> None:
    """But for values that another order of summation brings to the other side of a rounding."""
    words, expected = one_rank
    run = tmp_path / "run"
    log, _ = launch(2, train_and_log, [*words, *layout, f"train.run_dir={run}"])
    assert "fp8: recipe mxfp8, format e4m3 (emulated: for the numbers, slower than without)" in log
    assert log.count("fp8: 12 of the model's 16 linear layers are quantised") == 2  # policy and reference
    lines = training_lines(run)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for a, b in zip(training_lines(expected), lines, strict=True):
        # The loss of the third step multiplies what log-probs of -1000 nats differ by, which depends on the CPU too.
        for name in ("logps/chosen", "logps/rejected"):
            assert b[name] == pytest.approx(a[name], rel=1e-4 if a["step"] < 3 else 3e-4)
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-3 if a["step"] < 3 else 4e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
        assert b["tokens/computed"] % multiple == 0
    checks = [line for line in metrics(run) if "fp8/margin_error" in line]
    assert [line["step"] for line in checks] == [0, 2, 3]
    assert checks[0]["fp8/margin_error"] == 0 < checks[0]["fp8/policy_margin_error"]
    assert 0 < checks[1]["fp8/margin_error"] <= checks[1]["fp8/margin_error_max"]
    assert any(line.startswith("fp8 after 2 steps: margins off by 0.0") for line in log)


def test_recomputed_layers_are_quantised_alike(words: list[str], tmp_path: Path) -> None:
    words = [*words, "precision.fp8=tensorwise", "train.max_steps=2"]
    launch(1, train, [*words, f"train.run_dir={tmp_path / 'kept'}"])
    launch(1, train, [*words, f"train.run_dir={tmp_path / 'again'}", "model.recompute_granularity=full"])
    assert numbers(tmp_path / "kept") == numbers(tmp_path / "again")


def test_a_reference_without_fp8_is_found(words: list[str], tmp_path: Path) -> None:
    words = [*words, "precision.fp8=tensorwise", f"train.run_dir={tmp_path / 'run'}"]
    (said,) = launch(1, refusal_of_layers_left_out, words)
    assert "precision.fp8=tensorwise: other linear layers compute in FP8 than should (0 of 4 in layer 0, " in said
    (said,) = launch(1, refusal_of_a_plain_reference, [*words, f"train.run_dir={tmp_path / 'other'}"])
    assert said.startswith("step 1: the loss is 0.68") and "The two models compute different numbers" in said
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_kept_log_probs_serve_another_packing(recipe: str, words: list[str], tmp_path: Path) -> None:
    """Blocks lie within a token's values: what shares a microbatch changes the order of sums only."""
    cached = ["reference.mode=cached", f"reference.cache_dir={tmp_path / 'cache'}", "train.max_steps=1"]
    words = [*words, f"precision.fp8={recipe}", *cached]
    launch(1, train, [*words, f"train.run_dir={tmp_path / 'first'}"])
    other = ["data.tokens_per_microbatch=1024", "data.share_prompt=false", "train.seed=5"]
    (log,) = launch(1, train_and_log, [*words, *other, f"train.run_dir={tmp_path / 'other'}"])
    assert (
        log.count("fp8: 16 of the model's 16 linear layers are quantised") == 1
    )  # the policy's: no reference was built
    assert training_lines(tmp_path / "first")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(training_lines(tmp_path / "other")[0]["loss"] - math.log(2)) <= 1e-4
