"""What saves memory or time changes no number: one trajectory with every key, and the effect that each has."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megadpo.models.options import Recompute
from tests.helpers.jobs.memory import kept_for_backward, train_pretending, train_watching_exchanges
from tests.helpers.jobs.training import main_weights_apart, train
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_same_evaluations, assert_same_trajectory, training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

LR = 1e-3
STEPS = 3
OVERLAPS = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=10000"]
FULL = ["model.recompute_granularity=full"]
SELECTIVE = ["model.recompute_granularity=selective", "model.recompute_modules=[core_attn,mlp]"]
TP2_PP2 = ["parallel.tensor=2", "parallel.pipeline=2"]
UNEVEN = "parallel.num_layers_in_{}_pipeline_stage={}".format

# name: ranks, words. The keys come together where they meet: hooks of the weights run again in what is recomputed,
# buckets are cut where stages are, evaluation asks for weights that are still on their way.
LAYOUTS = {
    "tp2_full": (2, ["parallel.tensor=2", *FULL, "model.recompute_num_layers=3"]),
    "dp2_overlaps_selective": (2, [*OVERLAPS, *SELECTIVE]),
    "pp2_uneven_block": (
        2,
        [
            "parallel.pipeline=2",
            UNEVEN("first", 4),
            *FULL,
            "model.recompute_method=block",
            "model.recompute_num_layers=3",
        ],
    ),
    "pp2_vpp2_uneven_full": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", UNEVEN("last", 2), *FULL]),
    "pp2_vpp2_dp2_overlaps": (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", UNEVEN("first", 2), *OVERLAPS]),
    "tp2_pp2_uneven_selective": (4, [*TP2_PP2, UNEVEN("last", 1), *SELECTIVE]),
    "pp3_uneven": (
        3,
        ["parallel.pipeline=3", UNEVEN("first", 1), UNEVEN("last", 2), "model.recompute_granularity=selective"],
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Words of an fp32 run of a tied model with six layers that evaluates after each step; and where a plain one lies.

    Clipping is active, there are several microbatches a step, and the sizes are no multiples of 128, so that buckets
    are padded.
    """
    root = tmp_path_factory.mktemp("knobs")
    model = write_tiny_model(root / "model", "qwen2", tied=True, num_layers=6, hidden=76, heads=2, kv_heads=1)
    words = [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={write_jsonl(root / 'pairs.jsonl', make_pairs(14, seed=5))}",
        "data.validation_fraction=0.2",
        "data.tokens_per_microbatch=400",
        "precision.dtype=fp32",
        "device.kind=auto",
        "trackers=[jsonl]",
        f"train.max_steps={STEPS}",
        "train.global_batch_size=6",
        "train.eval_every=1",
        "train.save_every=1",
        "checkpoint.keep_last=3",
        f"optimizer.lr={LR}",
        "optimizer.weight_decay=0.01",
        "optimizer.schedule=constant",
    ]
    launch(1, train, [*words, f"train.run_dir={root / 'plain'}"])
    return words, root


@pytest.fixture(scope="module")
def plain_bf16(plain: tuple[list[str], Path]) -> tuple[list[str], Path]:
    """Words of the same run in bf16; it lies in plain_bf16."""
    words, root = plain
    words = [*words, "precision.dtype=bf16"]
    launch(2, train, [*words, f"train.run_dir={root / 'plain_bf16'}"])
    return words, root


def assert_same_run(expected: Path, actual: Path) -> None:
    assert_same_trajectory(expected, actual, lr=LR)
    assert_same_evaluations(expected, actual)


def go_on(run_dir: Path, copy: Path) -> list[str]:
    """Words that continue a copy of the run from its checkpoint of step 1."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "hf")
    for step in range(2, STEPS + 1):
        shutil.rmtree(checkpoint(copy, step))
    return [f"train.run_dir={copy}", "train.resume=auto"]


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_trajectory(name: str, plain: tuple[list[str], Path]) -> None:
    words, root = plain
    world, knobs = LAYOUTS[name]
    launch(world, train, [*words, *knobs, "train.save_every=null", f"train.run_dir={root / name}"])
    assert_same_run(root / "plain", root / name)


def test_a_head_of_its_own_overlaps_too(plain: tuple[list[str], Path]) -> None:
    """It adds up its gradient in Megatron's buffer by itself, and keeps the promises that Megatron's layers make."""
    words, root = plain
    model = write_tiny_model(root / "untied", "llama", num_layers=2)
    words = [*words, f"model.hf_path={model}", "train.save_every=null"]
    launch(1, train, [*words, f"train.run_dir={root / 'untied_plain'}"])
    launch(2, train, [*words, *OVERLAPS, f"train.run_dir={root / 'untied_overlapped'}"])
    assert_same_run(root / "untied_plain", root / "untied_overlapped")


def test_recomputation_keeps_less_and_changes_no_bit(tmp_path: Path) -> None:
    """The gradients are the same numbers; what is kept for the backward shrinks in the order of the work."""
    model = write_tiny_model(tmp_path / "model", "llama", hidden=128)
    modes = {
        "none": Recompute(),
        "core_attn": Recompute(granularity="selective", modules=("core_attn",)),
        "mlp": Recompute(granularity="selective", modules=("mlp",)),
        "both": Recompute(granularity="selective", modules=("core_attn", "mlp")),
        "half": Recompute(granularity="full", method="block", num_layers=2),
        "full": Recompute(granularity="full", method="uniform", num_layers=1),
        "full_by_two": Recompute(granularity="full", method="uniform", num_layers=2),
    }
    (results,) = launch(1, kept_for_backward, str(model), modes)
    _, gradients = results["none"]
    for _, others in results.values():
        assert all(np.array_equal(gradients[name], others[name]) for name in gradients)
    share = {name: kept / results["none"][0] for name, (kept, _) in results.items()}
    assert share["core_attn"] < 0.95
    assert share["both"] < share["mlp"] < 0.6
    assert share["full_by_two"] < share["full"] < 0.15 < share["both"] < share["half"] < 0.6


def test_overlapped_exchanges_start_early_and_resume_anywhere(plain: tuple[list[str], Path]) -> None:
    """Gradients leave during the backward, weights come in during the forward; checkpoints hold the last update."""
    words, root = plain
    layout = ["parallel.pipeline=2", UNEVEN("first", 4)]
    run = root / "overlapped"
    counts, *_ = launch(4, train_watching_exchanges, [*words, *layout, *OVERLAPS, f"train.run_dir={run}"])
    assert_same_run(root / "plain", run)
    # In the first step Megatron learns which gradients come when: it sends them at the end.
    groups = counts["reduced while finalizing"]
    assert groups > 3
    assert counts["reduced while computing"] == (STEPS - 1) * groups
    assert counts["gathered while computing"] >= STEPS * groups
    assert counts["gathered while updating"] == 0
    assert counts["gathered while saving"] == (STEPS + 1) * groups  # three checkpoints and the export

    # Buckets and the cut are not part of a checkpoint.
    launch(2, train, [*words, "parallel.pipeline=2", *go_on(run, root / "overlapped_to_even")])
    assert_same_run(root / "plain", root / "overlapped_to_even")


def test_precision_aware_optimizer(plain: tuple[list[str], Path]) -> None:
    """A stand-in for Transformer Engine's FusedAdam: with fp32 moments the same run at any layout.

    To and from torch's AdamW too.
    """
    words, root = plain
    aware = "optimizer.precision_aware=true"
    run = root / "aware"
    seen, _ = launch(2, train_pretending, "fused_adam", [*words, aware, f"train.run_dir={run}"])
    assert_same_run(root / "plain", run)
    options = seen["options"]
    assert options["master_weights"] and options["use_decoupled_grad"] and not options["store_param_remainders"]
    assert seen["moment_bytes"] == 4 * seen["moments"]

    for name, layout in (("aware_tp2_pp2", [*TP2_PP2, UNEVEN("last", 1)]), ("aware_pp2_dp2", ["parallel.pipeline=2"])):
        cut = [*words, *layout, *OVERLAPS, "train.save_every=null", f"train.run_dir={root / name}"]
        launch(4, train_pretending, "fused_adam", [*cut, aware])
        assert_same_run(root / "plain", root / name)

    launch(1, train, [*words, *go_on(run, root / "aware_to_adamw")])
    assert_same_run(root / "plain", root / "aware_to_adamw")
    launch(2, train_pretending, "fused_adam", [*words, aware, *go_on(root / "plain", root / "adamw_to_aware")])
    assert_same_run(root / "plain", root / "adamw_to_aware")


def test_moments_in_fewer_bytes(plain_bf16: tuple[list[str], Path]) -> None:
    """bf16 and fp16 moments: half the bytes, another rounding, in the master weights of a bf16 model."""
    words, root = plain_bf16
    moments = ["optimizer.precision_aware=true", "optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=fp16"]
    narrow = [*moments, "parallel.grad_reduce_in_fp32=false", f"train.run_dir={root / 'narrow'}"]
    seen, _ = launch(2, train_pretending, "fused_adam", [*words, *narrow])
    assert seen["moment_bytes"] == 2 * seen["moments"]
    for a, b in zip(training_lines(root / "plain_bf16"), training_lines(root / "narrow"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-2)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-2)


def test_optimizer_on_the_host(plain_bf16: tuple[list[str], Path]) -> None:
    """Megatron's own optimizer, in a memory apart: the same update, and runs that go on as if they had never stopped.

    The share that stays beside the model is a stand-in FusedAdam's.
    """
    words, root = plain_bf16
    host = "optimizer.cpu_offload=true"
    half = [host, "optimizer.offload_fraction=0.5"]
    overlap = "optimizer.overlap_cpu_optimizer_d2h_h2d=true"
    seen, _ = launch(2, train_pretending, "host_memory", [*words, host, overlap, f"train.run_dir={root / 'host'}"])
    assert seen["device"] == 0
    assert seen["host_optimizers"] > 10  # one a parameter, so that copies and updates take turns
    seen, _ = launch(2, train_pretending, "host_memory", [*words, *half, f"train.run_dir={root / 'half'}"])
    assert seen["host_optimizers"] == 1
    assert 0.5 <= seen["host"] / (seen["host"] + seen["device"]) < 0.7
    launch(2, train_pretending, "host_memory", [*words, *half, *go_on(root / "half", root / "half_resumed")])
    launch(1, train, [*words, *go_on(root / "host", root / "host_to_adamw")])
    cut = [*words, *TP2_PP2]
    launch(4, train, [*cut, f"train.run_dir={root / 'cut_bf16'}"])
    launch(4, train_pretending, "host_memory", [*cut, host, f"train.run_dir={root / 'cut_host'}"])

    pairs = [("plain_bf16", "host"), ("cut_bf16", "cut_host"), ("host", "host_to_adamw"), ("half", "half_resumed")]
    paths = [tuple(str(checkpoint(root / run, STEPS)) for run in pair) for pair in pairs]
    paths.append((str(checkpoint(root / "plain_bf16", 1)), str(checkpoint(root / "half", 1))))
    ((whole, cut_apart, in_adamw, resumed, half_of_first_step),) = launch(1, main_weights_apart, paths)
    assert max(whole, cut_apart) <= 1e-7
    assert in_adamw <= 1e-7
    assert resumed == 0.0
    # Later on FusedAdam's rounding ends in another bf16 weight now and then.
    assert half_of_first_step <= 2e-7
