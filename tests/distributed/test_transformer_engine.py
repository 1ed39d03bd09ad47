"""Layers of Transformer Engine compute what the native ones do, from and into the same checkpoints and files.

Transformer Engine is a stand-in that computes in plain torch (tests/helpers/stand_ins/te): what is shown is which
layers are built, what they are called with, and where weights and optimizer state go.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.jobs.fault import Start
from tests.helpers.jobs.te import STAND_IN, Served, start_and_score
from tests.helpers.jobs.training import compare_checkpoints, train
from tests.helpers.launch import launch
from tests.helpers.naive import pair_logps
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_same_trajectory, training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.tokenized import tokenized_pairs

LR = 1e-3
BY_TRANSFORMER_ENGINE = ["precision.backend=auto", "device.attention=transformer_engine"]


def continued_from(run_dir: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run that ends at the checkpoint of `step`."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "hf")
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if checkpoint.name != f"step_{step:08}":
            shutil.rmtree(checkpoint)
    return copy


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Path, list[str]]:
    """(root, models with a bias and a tied head, and with norms of heads; pairs; words of a run of the latter)."""
    root = tmp_path_factory.mktemp("te")
    models = [write_tiny_model(root / family, family, num_layers=2) for family in ("qwen2", "qwen3")]
    data = write_jsonl(root / "pairs.jsonl", make_pairs(12, seed=3))
    words = [
        "+model=hf",
        f"model.hf_path={models[1]}",
        f"data.train_path={data}",
        "data.tokens_per_microbatch=600",
        "precision.dtype=fp32",
        "trackers=[jsonl]",
        "train.max_steps=4",
        "train.save_every=2",
        "train.global_batch_size=6",
        f"optimizer.lr={LR}",
        "optimizer.weight_decay=0.01",
        "optimizer.schedule=constant",
        "train.resume=auto",
        "parallel.tensor=2",
    ]
    launch(2, train, [*words, f"train.run_dir={root / 'native'}"])
    return root, models, data, words


@pytest.fixture(scope="module")
def served(inputs: tuple[Path, list[Path], Path, list[str]]) -> list[Served]:
    """What `start_and_score` returned on two tensor-parallel ranks: a whole run, and one from a native checkpoint."""
    root, models, data, words = inputs
    continued_from(root / "native", root / "native_then_te", 2)
    starts = [
        Start(name, [*words, *BY_TRANSFORMER_ENGINE, f"train.run_dir={root / name}"], root / name)
        for name in ("te", "native_then_te")
    ]
    checkpoint = root / "native" / "checkpoints" / "step_00000004"
    names = [str(model) for model in models]
    return launch(2, start_and_score, starts, names, str(data), {"tensor": 2}, checkpoint, packages=STAND_IN)


def test_runs_end_and_say_what_computes(served: list[Served], inputs: tuple[Path, list[Path], Path, list[str]]) -> None:
    root = inputs[0]
    for rank in served:
        assert {name: outcome.text for name, outcome in rank.outcomes.items()} == {"te": "", "native_then_te": ""}
    log = served[0].outcomes["te"].log
    assert "layers: transformer_engine 2.11.0; weight gradients are added up inside the matrix product" in log
    assert "AdamW is transformer_engine's" in log
    assert "attention: transformer_engine" in log
    resumed = "resuming with precision.backend=transformer_engine; the checkpoint was written with native"
    assert resumed in served[0].outcomes["native_then_te"].log
    saved = {name: yaml.safe_load((root / name / "config.yaml").read_text()) for name in ("native", "te")}
    assert saved["native"]["precision"]["backend"] == "native"
    assert saved["te"]["precision"]["backend"] == "transformer_engine"


def test_trains_as_native_layers_do(served: list[Served], inputs: tuple[Path, list[Path], Path, list[str]]) -> None:
    root = inputs[0]
    assert served
    assert training_lines(root / "te")[0]["loss"] == pytest.approx(math.log(2), abs=1e-9)
    assert_same_trajectory(root / "native", root / "te", lr=LR)


def test_goes_on_from_a_native_checkpoint(
    served: list[Served], inputs: tuple[Path, list[Path], Path, list[str]]
) -> None:
    """Moments and step counters too: the fused Adam counts on from torch's."""
    root = inputs[0]
    assert served
    assert_same_trajectory(root / "native", root / "native_then_te", lr=LR)


def test_native_layers_go_on_from_its_checkpoint(
    served: list[Served], inputs: tuple[Path, list[Path], Path, list[str]], tmp_path: Path
) -> None:
    root, _, _, words = inputs
    assert served
    run_dir = continued_from(root / "te", tmp_path / "te_then_native", 2)
    launch(2, train, [*words, f"train.run_dir={run_dir}"])
    assert_same_trajectory(root / "native", run_dir, lr=LR)


def test_checkpoints_hold_the_same_entries(
    served: list[Served], inputs: tuple[Path, list[Path], Path, list[str]]
) -> None:
    """Names of weights, main weights and moments; a checkpoint of before the first difference is bit-equal."""
    root = inputs[0]
    assert served
    steps = [root / name / "checkpoints" / "step_00000004" for name in ("native", "te")]
    ((names, _),) = launch(1, compare_checkpoints, str(steps[0]), str(steps[1]))
    ((of_te, _),) = launch(1, compare_checkpoints, str(steps[1]), str(steps[0]))
    assert names == of_te
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in names


def test_scores_equal_transformers_and_the_way_back_is_bit_equal(
    served: list[Served], inputs: tuple[Path, list[Path], Path, list[str]]
) -> None:
    _, models, data, _ = inputs
    scores = served[-1].scores
    for model in models:
        expected = pair_logps(model, tokenized_pairs(data, model, max_length=512))
        assert scores[str(model)].keys() == expected.keys()
        for index, logps in expected.items():
            assert scores[str(model)][index] == pytest.approx(logps, rel=1e-4), f"{model}, pair {index}"
        before = load_file(model / "model.safetensors")
        after = load_file(Path(f"{model}-export-tensor2") / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_attention_takes_shared_prompts_keys_and_no_more(served: list[Served]) -> None:
    """A stream's keys are its rows and, once more, the prompts that rejected responses see; so in each layer."""
    for rank in served:
        calls = rank.attention_calls
        assert calls
        assert calls[::2] == calls[1::2]  # two layers
        assert all(keys > queries for queries, keys, _ in calls)


def test_histories_of_delayed_scaling_are_neither_read_nor_written(served: list[Served]) -> None:
    """They are pickles, which Transformer Engine loads as pickles are: whoever made them could run a program."""
    for rank in served:
        assert rank.delayed.kept == []
        *ways, by_itself = rank.delayed.ran.items()
        assert ways == [("weights", False), ("reference", False), ("checkpoint", False)]
        assert by_itself[1]
    said = [line for line in served[0].delayed.log if "delayed scaling begins a new history" in line]
    assert len(said) == 1


def test_fp8_reaches_the_layers_that_should_have_it_and_can_be_left_for_a_moment(served: list[Served]) -> None:
    fp8 = served[0].fp8
    assert fp8.counted == (4, 8)
    assert fp8.layers == {"with": [1], "without": [], "with again": [1]}
    assert fp8.logps["with"] == fp8.logps["with again"]
    assert fp8.logps["without"] != fp8.logps["with"] == pytest.approx(fp8.logps["without"], rel=2e-2)
    assert "other linear layers compute in FP8 than should (0 of 4 in layer 1)" in fp8.refused
