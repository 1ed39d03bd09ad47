"""Numbers that are not finite on one rank: the update is skipped on all, counted, written down; many in a row stop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs.bad import Fault, Seen, train_with_faults
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_bit_equal, metrics, training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

LN_2 = 0.6931471805599453
LOSS = "the loss is not finite"
NORM = "the gradient norm is nan"
BESIDE = "a gradient that the norm leaves out, as it counts another rank's copy, is not finite"
OVERLAPS = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=10000"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A tied model, whose head is left out of the norm on the last stage; six updates, a line every second one."""
    root = tmp_path_factory.mktemp("bad_steps")
    model = write_tiny_model(root / "model", "qwen2", tied=True, num_layers=2, hidden=40, heads=2, kv_heads=2)
    return root, [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={write_jsonl(root / 'pairs.jsonl', make_pairs(10, seed=5))}",
        "data.tokens_per_microbatch=400",
        "device.kind=cpu",
        "trackers=[jsonl]",
        "train.max_steps=6",
        "train.global_batch_size=4",
        "train.log_every=2",
        "optimizer.lr=1e-3",
    ]


def dump(run_dir: Path, step: int) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "bad_steps" / f"step_{step:08d}.json").read_text()
    return dict(json.loads(text, parse_constant=refuse))


# Layout: words, ranks, and why each bad step is skipped. The first update is bad: the check of the first loss waits.
CASES: dict[str, tuple[int, list[str], dict[int, list[Fault]], dict[int, tuple[str, ...]]]] = {
    "tp2": (
        2,
        ["parallel.tensor=2", "precision.dtype=bf16"],
        {
            1: [Fault(1, "before", "linear_fc1.weight")],
            3: [Fault(1, "after", "final_layernorm.weight")],
            4: [Fault(0, "loss")],
        },
        {1: (NORM,), 3: (BESIDE,), 4: (LOSS, NORM, BESIDE)},
    ),
    "pp2": (
        2,
        ["parallel.pipeline=2", "precision.dtype=fp32"],
        {
            1: [Fault(0, "before", "linear_proj.weight")],
            3: [Fault(1, "after", "output_layer.weight")],
            4: [Fault(1, "loss")],
        },
        {1: (NORM,), 3: (BESIDE,), 4: (LOSS, NORM, BESIDE)},
    ),
    "dp2": (
        2,
        ["precision.dtype=fp32"],
        {1: [Fault(1, "loss")], 3: [Fault(0, "after")], 4: [Fault(1, "before", "linear_fc2.weight")]},
        {1: (LOSS, NORM), 3: (NORM,), 4: (NORM,)},
    ),
    "dp2_overlaps": (
        2,
        [*OVERLAPS, "precision.dtype=bf16"],
        {1: [Fault(0, "after")], 3: [Fault(1, "after")], 4: [Fault(1, "loss")]},
        {1: (NORM,), 3: (NORM,), 4: (LOSS, NORM)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_step_is_skipped_on_every_rank(name: str, inputs: tuple[Path, list[str]]) -> None:
    root, words = inputs
    world, layout, faults, why = CASES[name]
    run = root / name
    seen: list[Seen] = launch(world, train_with_faults, [*words, *layout, f"train.run_dir={run}"], faults)
    for rank in seen:
        assert rank.error == ""
        assert {step: found for step, found in rank.skipped.items() if found} == why
        assert rank.changed == {step: step not in why for step in range(1, 7)}
        assert set(rank.votes.values()) == {(world - 1.0, 0.0)}
    told = [line for line in seen[0].log if "IS SKIPPED" in line]
    assert len(told) == 3
    assert all(pair["where"].endswith(f"pairs.jsonl:{pair['row'] + 1}") for pair in dump(run, 4)["pairs"])
    assert f"{run}/bad_steps/step_00000004.json" in told[2] and "3 steps skipped so far, 2 in a row" in told[2]

    first, nothing, last = metrics(run)
    assert first["loss"] == pytest.approx(LN_2, abs=1e-6)  # of step 2, the first update that was made
    assert [line["steps/skipped"] for line in (first, nothing, last)] == [1, 3, 3]
    assert (first["pairs"], nothing["pairs"], last["pairs"]) == (2.0, 0.0, 3.0)  # 4, 2 and 4 pairs in steps 2, 5 and 6
    assert not {"loss", "grad_norm", "rewards/chosen"} & set(nothing) and nothing["tokens"] > 0
    assert all(value is not None for line in (first, nothing, last) for value in line.values())

    for step, reasons in why.items():
        report = dump(run, step)
        assert (report["step"], report["why"]) == (step, list(reasons))
        assert len(report["pairs"]) == (2 if step == 3 else 4)
        infinite = [pair for pair in report["pairs"] if pair["loss"] == "inf"]
        assert bool(infinite) == (LOSS in reasons)
        assert all(pair["where"] in next(line for line in told if f"step {step} " in line) for pair in infinite)
        assert all(math.isfinite(pair["policy_chosen"]) for pair in report["pairs"])
    assert dump(run, 1)["grad_norm"] == "nan"
    rows = [pair["row"] for step in why for pair in dump(run, step)["pairs"]]
    assert set(rows) <= set(range(10))


def test_too_many_in_a_row_stop_the_run_which_can_go_on(inputs: tuple[Path, list[str]]) -> None:
    """Stopped behind three bad steps and resumed is the run that was allowed more of them; no batch is taken twice."""
    root, words = inputs
    words = [*words, "train.log_every=1", "precision.dtype=bf16"]
    faults = {2: [Fault(0, "loss")], 4: [Fault(0, "after")], 5: [Fault(0, "loss")]}
    stopped, whole = root / "stopped", root / "whole"
    (patient,) = launch(1, train_with_faults, [*words, "train.max_bad_steps=3", f"train.run_dir={whole}"], faults)
    assert patient.error == ""
    (seen,) = launch(1, train_with_faults, [*words, "train.max_bad_steps=2", f"train.run_dir={stopped}"], faults)
    assert seen.error.startswith(
        "TrainingError: train.max_bad_steps=2: the last 2 steps up to 5 were skipped, as their loss or gradient was "
        "not finite. The checkpoint of step 5 holds the weights of the last update"
    )
    assert [path.name for path in (stopped / "checkpoints").iterdir() if path.is_dir()] == ["step_00000005"]
    assert json.loads((stopped / "checkpoints" / "step_00000005" / "training.json").read_text())["skipped"] == 3
    (resumed,) = launch(
        1, train_with_faults, [*words, f"train.run_dir={stopped}", "train.resume=auto", "train.max_bad_steps=2"], {}, 6
    )
    assert (resumed.error, list(resumed.skipped)) == ("", [6])
    assert_bit_equal(whole, stopped)
    assert training_lines(stopped)[-1]["steps/skipped"] == 3


@pytest.mark.parametrize("limit", ["max_bad_steps", "max_steps"])
def test_without_any_update_nothing_is_saved(limit: str, inputs: tuple[Path, list[str]]) -> None:
    """Amax histories of emulated FP8 are set back too: a NaN would stay in them."""
    root, words = inputs
    fp8 = ["precision.dtype=bf16", "precision.fp8=delayed", "precision.fp8_backend=emulate", "reference.mode=none"]
    run = root / limit
    words = [*words, *fp8, "+loss=simpo", "train.max_bad_steps=4", f"train.{limit}=3", f"train.run_dir={run}"]
    faults = {step: [Fault(0, "loss")] for step in (1, 2, 3)}
    (seen,) = launch(1, train_with_faults, [*words, "train.save_every=2"], faults)
    assert "No update has been made, and nothing was saved" in seen.error
    assert json.loads((run / ".launch.json").read_text())["wrong"], "no start of the same launch may call it stopped"
    assert seen.changed == {1: False, 2: False, 3: False}
    assert [line for line in seen.log if "step 2: nothing is saved" in line]
    assert not list((run / "checkpoints").glob("step_*")) and not (run / "hf").exists()


def test_stopped_without_any_update_a_run_does_not_say_that_it_has_saved(inputs: tuple[Path, list[str]]) -> None:
    root, words = inputs
    run = root / "stopped_at_once"
    words = [*words, "precision.dtype=fp32", "train.max_hours=1e-6", f"train.run_dir={run}"]
    (seen,) = launch(1, train_with_faults, words, {1: [Fault(0, "loss")]})
    assert seen.error.startswith(
        "Stopped: stopped by train.max_hours=1e-06 after step 1, and nothing was saved, as no update has been made: "
    )
    assert not list((run / "checkpoints").glob("step_*"))
