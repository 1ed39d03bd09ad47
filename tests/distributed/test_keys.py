"""Every key reaches what it steers: one short run a key, compared with the same run without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.checkpoint.description import read_training
from megadpo.checkpoint.directory import list_checkpoints, step_of
from tests.helpers.jobs.logprob import train_and_measure_chunks
from tests.helpers.jobs.training import train
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import (
    assert_close_weights,
    assert_same_trajectory,
    exported_weights,
    metrics,
    training_lines,
    write_jsonl,
)
from tests.helpers.tiny_models import write_tiny_model

Lines = list[dict[str, Any]]
LN_2 = 0.6931471805599453


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("keys")
    pairs = make_pairs(16, seed=7)
    write_tiny_model(root / "other", "llama", seed=1, num_layers=2)
    renamed = [{"question": p["prompt"], "good": p["chosen"], "bad": p["rejected"]} for p in pairs]
    write_jsonl(root / "renamed.jsonl", renamed)
    return root, [
        "+model=hf",
        f"model.hf_path={write_tiny_model(root / 'model', 'llama', num_layers=2)}",
        f"data.train_path={write_jsonl(root / 'pairs.jsonl', pairs)}",
        "precision.dtype=fp32",
        "device.kind=cpu",
        "trackers=[jsonl]",
        "train.max_steps=3",
        "train.global_batch_size=4",
        "optimizer.lr=1e-3",
    ]


@pytest.fixture(scope="module")
def run(inputs: tuple[Path, list[str]]) -> Callable[..., Path]:
    """Trains with further words and returns the run directory; equal words are run once."""
    root, common = inputs
    done: dict[tuple[str, ...], Path] = {}

    def call(*words: str) -> Path:
        if words not in done:
            directory = root / f"run{len(done)}"
            launch(1, train, [*common, *(word.format(root=root) for word in words), f"train.run_dir={directory}"])
            done[words] = directory
        return done[words]

    return call


def differ(a: Path, b: Path) -> bool:
    """Whether two runs end with other weights."""
    first, second = exported_weights(a), exported_weights(b)
    return any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "words",
    [
        ("loss.label_smoothing=0.3",),
        ("loss.beta=0.5",),
        ("loss.name=ipo",),
        ("optimizer.betas=[0.5,0.7]",),
        ("optimizer.eps=1e-2",),
        ("optimizer.weight_decay=0.5",),
        ("optimizer.clip_grad=1e-3", "optimizer.eps=1e-2"),
    ],
    ids=lambda words: words[0],
)
def test_changes_training_and_not_what_precedes_it(words: tuple[str, ...], run: Callable[..., Path]) -> None:
    base, changed = training_lines(run(*words[1:])), training_lines(run(*words))
    for key in ("logps/chosen", "logps/rejected", "tokens"):
        assert changed[0][key] == base[0][key]
    assert differ(run(*words), run(*words[1:]))


def test_ipo_with_and_without_length_normalisation(run: Callable[..., Path]) -> None:
    normalised, plain = run("loss.name=ipo"), run("loss.name=ipo", "loss.ipo_length_normalize=false")
    assert training_lines(normalised)[0]["loss"] == training_lines(plain)[0]["loss"] == pytest.approx(25.0)
    assert differ(normalised, plain)


def test_a_mix_starts_at_the_sum_of_its_losses(run: Callable[..., Path]) -> None:
    """And `ld_alpha` reaches the policy and the reference alike, or the first step would not be let through."""
    mix = training_lines(run("loss.name=[sigmoid,bco_pair]", "loss.weights=[1,0.5]", "loss.ld_alpha=0.25"))
    assert mix[0]["loss"] == pytest.approx(2 * LN_2, abs=1e-6)
    assert mix[0]["rewards/chosen"] == mix[0]["rewards/rejected"] == 0.0


def test_sft_in_evaluation_is_the_token_mean_of_the_whole_set(run: Callable[..., Path]) -> None:
    words = ("loss.name=[sigmoid,sft]", "loss.weights=[1,0.5]", "data.validation_fraction=0.5", "train.max_steps=1")
    before = [metrics(run(*words, f"train.global_batch_size={size}"))[0] for size in (8, 3)]
    assert before[0]["eval/loss"] == pytest.approx(before[1]["eval/loss"], rel=1e-6)
    assert before[0]["eval/loss"] > LN_2 + 0.5


def test_no_clipping_still_reports_the_norm(run: Callable[..., Path]) -> None:
    base, free = training_lines(run()), training_lines(run("optimizer.clip_grad=0"))
    assert free[0]["grad_norm"] == base[0]["grad_norm"] > 1.0


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ((), [1e-3, 2e-3 / 3, 1e-3 / 3]),
        (("optimizer.min_lr=4e-4",), [1e-3, 8e-4, 6e-4]),
        (("optimizer.schedule=constant",), [1e-3, 1e-3, 1e-3]),
        (("optimizer.schedule=cosine",), [1e-3, 7.5e-4, 2.5e-4]),
        (("optimizer.warmup_steps=2",), [0.0, 5e-4, 1e-3]),
    ],
    ids=str,
)
def test_learning_rates(words: tuple[str, ...], rates: list[float], run: Callable[..., Path]) -> None:
    assert [line["lr"] for line in training_lines(run(*words))] == pytest.approx(rates)


@pytest.mark.parametrize("word", ["train.seed=1", "train.shuffle=false"])
def test_order_of_the_data(word: str, run: Callable[..., Path]) -> None:
    assert [line["tokens"] for line in training_lines(run())] != [line["tokens"] for line in training_lines(run(word))]


def test_lengths_and_intervals(run: Callable[..., Path]) -> None:
    directory = run(
        *("train.max_steps=null", "train.epochs=2", "train.global_batch_size=5", "train.log_every=2"),
        *("data.validation_fraction=0.2", "train.eval_every=3", "train.save_every=4", "data.max_length=200"),
    )
    lines = metrics(directory)
    trained = [line for line in lines if "loss" in line]
    last = trained[-1]["step"]
    assert [line["step"] for line in trained] == [*range(2, last, 2), last]
    assert trained[-1]["epoch"] == 2.0
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert evaluated == [*range(0, last, 3), last]
    saved = {4 * k for k in range(1, last // 4 + 1)} | {last}
    assert {p.name for p in (directory / "checkpoints").glob("step_*")} == {
        f"step_{step:08d}" for step in sorted(saved)[-2:]
    }
    assert max(line["tokens"] / line["pairs"] for line in trained) <= 2 * 200


def test_which_checkpoints_stay(run: Callable[..., Path]) -> None:
    """The newest, every third and the best of six, which is none of these; each says what its evaluation has found."""
    directory = run(
        *("train.max_steps=6", "data.validation_fraction=0.2", "train.eval_every=1", "train.save_every=1"),
        *("checkpoint.keep_last=1", "checkpoint.keep_every=3", "checkpoint.keep_best=eval/rewards/margins"),
    )
    found = {line["step"]: line for line in metrics(directory) if "eval/loss" in line}
    the_best = max(range(1, 7), key=lambda step: found[step]["eval/rewards/margins"])
    assert the_best not in (3, 6)
    kept = list_checkpoints(directory / "checkpoints")
    assert [step_of(path) for path in kept] == sorted({the_best, 3, 6})
    for path in kept:
        assert {"step": step_of(path), **read_training(path)[1].metrics} == found[step_of(path)]


def test_what_became_of_the_data_is_written_and_truncation_reaches_the_run(run: Callable[..., Path]) -> None:
    cuts = {}
    for mode in ("keep_start", "keep_end"):
        directory = run("data.max_length=200", f"data.truncation={mode}")
        counts = json.loads((directory / "data.json").read_text())["sets"]["train"]
        assert counts["read"] == 16
        cuts[mode] = [line["tokens"] for line in training_lines(directory)]
        assert counts["truncated_prompt" if mode == "keep_end" else "truncated_chosen"] > 0
    assert cuts["keep_start"] != cuts["keep_end"]


def test_sharing_prompts_computes_less_and_changes_no_number(run: Callable[..., Path]) -> None:
    shared, separate = run(), run("data.share_prompt=false")
    for a, b in zip(training_lines(shared), training_lines(separate), strict=True):
        assert a["tokens/computed"] < b["tokens/computed"] and a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        for key in ("grad_norm", "logps/chosen", "logps/rejected"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert_close_weights(exported_weights(separate), exported_weights(shared), largest=2e-4)


def test_memory_for_logits_limits_the_rows_at_a_time_and_changes_no_number(
    inputs: tuple[Path, list[str]], tmp_path: Path
) -> None:
    words = [*inputs[1], "train.global_batch_size=16", "train.max_steps=2"]
    little, much = (f"train.run_dir={tmp_path / name}" for name in ("little", "much"))
    ((rows,), (all_rows,)) = (
        launch(1, train_and_measure_chunks, [*words, little, "model.logits_mib=1"]),
        launch(1, train_and_measure_chunks, [*words, much]),
    )
    assert rows * 401 * 4 <= 2**20 < all_rows * 401 * 4
    assert_same_trajectory(tmp_path / "much", tmp_path / "little", lr=1e-3)


def test_columns_of_other_names(run: Callable[..., Path]) -> None:
    keys = ("data.prompt_key=question", "data.chosen_key=good", "data.rejected_key=bad")
    renamed = run("data.train_path={root}/renamed.jsonl", *keys)
    assert not differ(run(), renamed)


def test_another_reference(run: Callable[..., Path]) -> None:
    first = training_lines(run("reference.hf_path={root}/other"))[0]
    assert first["loss"] != pytest.approx(LN_2, abs=1e-3)
    assert first["logps/chosen"] == training_lines(run())[0]["logps/chosen"]


def test_precision_of_the_export(run: Callable[..., Path]) -> None:
    assert {t.dtype for t in exported_weights(run()).values()} == {torch.float32}
    assert {t.dtype for t in exported_weights(run("precision.dtype=bf16")).values()} == {torch.bfloat16}


def test_trackers(run: Callable[..., Path]) -> None:
    assert not (run() / "tensorboard").exists()
    assert any((run("trackers=[jsonl,tensorboard]") / "tensorboard").iterdir())


def test_a_learning_rate_that_ruins_the_weights_stops_the_run(run: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match=r"train.max_bad_steps=1: the last 1 steps up to \d were skipped, as their"):
        run("optimizer.lr=1e30", "optimizer.clip_grad=0", "train.max_bad_steps=1")
