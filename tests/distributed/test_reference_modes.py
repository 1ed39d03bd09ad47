"""Runs with each kind of reference: one trajectory, a cache that is only ever completed, a reference that follows."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megadpo.reference.key import _checksum as checksum_of
from megadpo.reference.key import _identity as identity_of
from megadpo.reference.key import read_key
from megadpo.reference.store import _RECORD, open_store
from tests.helpers.jobs.conversion import export_hf, score_and_die, score_pairs
from tests.helpers.jobs.fault import Start, start_each
from tests.helpers.jobs.reference import (
    die_while_filling,
    read_checkpoint,
    train_and_watch,
)
from tests.helpers.jobs.training import train
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import (
    assert_bit_equal,
    assert_same_trajectory,
    exported_weights,
    metrics,
    training_lines,
    write_jsonl,
)
from tests.helpers.tiny_models import write_tiny_model

LN_2 = math.log(2)
LR = 1e-3
LD = "loss.ld_alpha=0.5"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Words of a run of one epoch, whose last batch is smaller, with a validation set; the loss asks for all sums."""
    root = tmp_path_factory.mktemp("modes")
    return root, [
        "+model=hf",
        f"model.hf_path={write_tiny_model(root / 'model', 'llama', num_layers=2)}",
        f"data.train_path={write_jsonl(root / 'pairs.jsonl', make_pairs(18, seed=7))}",
        "data.validation_fraction=0.2",
        "data.tokens_per_microbatch=700",
        LD,
        *("precision.dtype=fp32", "device.kind=cpu", "trackers=[jsonl]"),
        *("train.global_batch_size=4", f"optimizer.lr={LR}", "checkpoint.keep_last=5"),
    ]


@pytest.fixture(scope="module")
def modes(inputs: tuple[Path, list[str]]) -> Path:
    """One rank, one run a mode."""
    root, words = inputs
    launch(1, train, [*words, f"train.run_dir={root / 'resident'}"])
    launch(1, train, [*words, "reference.mode=offload", f"train.run_dir={root / 'offload'}"])
    (seen,) = launch(1, train_and_watch, [*words, "reference.mode=cached", f"train.run_dir={root / 'cached'}"])
    assert (seen.loaded, seen.alive, len(seen.scored), len(seen.asked)) == (1, 0, 18, 8 + 4)
    return root


def test_every_mode_is_one_trajectory_bit_for_bit(modes: Path) -> None:
    assert_bit_equal(modes / "resident", modes / "offload")
    assert_bit_equal(modes / "resident", modes / "cached")
    assert training_lines(modes / "resident")[0]["loss"] == pytest.approx(LN_2, abs=1e-6)


def test_what_a_reference_takes_is_in_the_metrics(modes: Path) -> None:
    lines = {mode: training_lines(modes / mode) for mode in ("resident", "offload", "cached")}
    size = sum(tensor.nbytes for tensor in load_file(modes / "model" / "model.safetensors").values())
    assert lines["resident"][0]["memory/reference_gib"] * 2**30 == pytest.approx(size, rel=0.3)  # fp32, padded
    assert {line["memory/reference_gib"] for mode in ("offload", "cached") for line in lines[mode]} == {0.0}
    assert reference_share(modes / "cached") < 0.02 < reference_share(modes / "resident")


def reference_share(run: Path) -> float:
    """The reference's part of a step's time, the least over the steps.

    These take 50 ms, and the thread that builds the next batch may keep the interpreter for 5 of them.
    """
    return min(line["time/reference_s"] / line["time/step_s"] for line in training_lines(run))


def segments(cache_dir: Path) -> dict[bytes, bytes]:
    """What is kept, by pair."""
    return {bytes(record["digest"]): record.tobytes() for record in records(cache_dir)}


def records(cache_dir: Path) -> list[np.void]:
    """What is kept of all keys, in the order of the segments' paths."""
    return [record for path in sorted(cache_dir.glob("*/*.logps")) for record in np.fromfile(path, _RECORD)]


def test_a_killed_filling_goes_on_with_what_is_missing(inputs: tuple[Path, list[str]], modes: Path) -> None:
    root, words = inputs
    words = [*words, "reference.mode=cached", f"train.run_dir={root / 'killed'}"]
    with pytest.raises(RuntimeError, match="died without a word"):
        launch(1, die_while_filling, words, 2)
    assert not (root / "killed" / "config.yaml").exists()
    (seen,) = launch(1, train_and_watch, words)
    # A sample of those that are there, and the rest.
    assert (seen.loaded, seen.alive, len(seen.scored)) == (1, 0, 8 + 10)
    assert "8 of 14 pairs of train have log-probs" in "\n".join(seen.log)
    assert segments(root / "killed" / "reference") == segments(root / "cached" / "reference")
    assert_bit_equal(root / "cached", root / "killed")


def test_a_cache_serves_another_layout_without_any_model(inputs: tuple[Path, list[str]], modes: Path) -> None:
    root, words = inputs
    cached = [*words, "reference.mode=cached", f"reference.cache_dir={root / 'shared'}"]
    layout = ["parallel.tensor=2", "parallel.pipeline=2"]
    written = launch(4, train_and_watch, [*cached, *layout, f"train.run_dir={root / 'tp2pp2'}"])
    assert [seen.loaded for seen in written] == [1] * 4
    used = launch(2, train_and_watch, [*cached, f"train.run_dir={root / 'dp2'}"])
    assert [(seen.loaded, seen.alive, seen.scored) for seen in used] == [(0, 0, [])] * 2
    assert "has the log-probs of all 18 pairs: no reference is built" in "\n".join(used[0].log)
    for run in ("tp2pp2", "dp2"):
        assert_same_trajectory(root / "resident", root / run, lr=LR, ties=True)
        assert abs(training_lines(root / run)[0]["loss"] - LN_2) <= 1e-5
    assert not list((root / "dp2").glob("reference"))


def test_scores_are_kept_for_training(inputs: tuple[Path, list[str]], modes: Path, tmp_path: Path) -> None:
    """A killed scoring leaves records of what it had written; after it has gone on there is one of every pair."""
    root, words = inputs
    cached = [*words, "reference.mode=cached", f"reference.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(RuntimeError, match="died without a word"):
        launch(1, score_and_die, cached, tmp_path / "scores.jsonl", 2)
    assert len(segments(tmp_path / "cache")) == 3 * 4
    log, _ = launch(2, score_pairs, [*cached, "parallel.pipeline=2"], tmp_path / "scores.jsonl")
    assert "has the log-probs of 18 of 18 pairs" in log
    assert len(records(tmp_path / "cache")) == 18
    (seen,) = launch(1, train_and_watch, [*cached, f"train.run_dir={root / 'scored'}"])
    assert (seen.loaded, seen.scored) == (0, [])
    assert_same_trajectory(root / "resident", root / "scored", lr=LR, ties=True)

    other = f"reference.hf_path={write_tiny_model(tmp_path / 'other', 'llama', num_layers=3)}"
    launch(1, score_pairs, [*cached, other], tmp_path / "two.jsonl")
    (seen,) = launch(1, train_and_watch, [*cached, other, "train.max_steps=1", f"train.run_dir={tmp_path / 'run'}"])
    assert (seen.loaded, seen.scored) == (0, []) and len(list((tmp_path / "cache").glob("*/key.json"))) == 2
    kept = {tuple(record["logps"][:2]) for record in records(tmp_path / "cache")}
    lines = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert {(line["reference_chosen_logp"], line["reference_rejected_logp"]) for line in lines} < kept


def test_whatever_changes_is_named_and_nothing_stale_is_used(
    inputs: tuple[Path, list[str]], modes: Path, tmp_path: Path
) -> None:
    root, words = inputs
    cache = tmp_path / "cache"
    shutil.copytree(root / "cached" / "reference", cache)
    for name in ("weights", "tokenizer", "template"):
        shutil.copytree(root / "model", tmp_path / name)
    weights = load_file(root / "model" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, tmp_path / "weights" / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"note": "changed",', 1))
    template = tmp_path / "template" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    pairs = make_pairs(18, seed=7)
    pairs[5]["chosen"] = pairs[6]["chosen"]
    write_jsonl(tmp_path / "text.jsonl", pairs)
    changes = {
        "nothing": [],
        "weights": [f"reference.hf_path={tmp_path / 'weights'}"],
        "tokenizer": [f"model.hf_path={tmp_path / 'tokenizer'}"],
        "template": [f"model.hf_path={tmp_path / 'template'}"],
        "precision": ["precision.dtype=bf16"],
        "text": [f"data.train_path={tmp_path / 'text.jsonl'}"],
    }
    common = [*words, "train.max_steps=1", "reference.mode=cached", f"reference.cache_dir={cache}"]
    starts = [
        Start(name, [*common, *change, f"train.run_dir={tmp_path / 'run' / name}"], tmp_path / "run" / name)
        for name, change in changes.items()
    ]
    (outcomes,) = launch(1, start_each, starts)
    assert {name: outcome.text for name, outcome in outcomes.items()} == dict.fromkeys(changes, "")
    said = {
        name: [line for line in outcomes[name].log.splitlines() if "not used, because of" in line] for name in changes
    }
    assert said["nothing"] == said["text"] == []
    for name, words_of_it in {
        "weights": "the reference's weights",
        "tokenizer": "the tokenizer",
        "template": "the chat template",
        "precision": "the precision (fp32 then, bf16 now)",
    }.items():
        assert [line.partition("because of ")[2] for line in said[name]] == [words_of_it], name
    assert re.search(
        r"the others were never reached, or have other tokens than before \(by their text, data.max_length, "
        r"data.truncation, or data.template_date=[-0-9]+\): rows 5 of ",
        outcomes["text"].log,
    )
    # The changed pair is the only one that was computed.
    assert len(segments(cache)) - len({*segments(root / "cached" / "reference")}) == 1
    assert {path.name for path in cache.iterdir()} > {"hashes.txt"} and len(list(cache.glob("*/key.json"))) == 5
    assert training_lines(tmp_path / "run" / "weights")[0]["loss"] != pytest.approx(LN_2, abs=1e-6)
    assert abs(training_lines(tmp_path / "run" / "precision")[0]["loss"] - LN_2) <= 1e-3


PRECISIONS = {
    "fp32": [],
    "bf16": ["precision.dtype=bf16"],
    "mxfp8": ["precision.dtype=bf16", "precision.fp8=mxfp8", "precision.fp8_backend=emulate"],
}


def test_numbers_of_other_weights_are_refused(inputs: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Of one model under the key of another: as if what computes had changed."""
    _, words = inputs
    other = write_tiny_model(tmp_path / "other", "llama", num_layers=2, seed=5)
    more = f"data.train_path={write_jsonl(tmp_path / 'more.jsonl', make_pairs(20, seed=7))}"
    common = [*words, "data.tokens_per_microbatch=704", "reference.mode=cached", "train.max_steps=1"]

    def start(name: str, *own: str) -> Start:
        run = tmp_path / "run" / name.replace(" ", "_")
        return Start(name, [*common, *own, f"train.run_dir={run}"], run)

    def cache(precision: str, name: str) -> str:
        return f"reference.cache_dir={tmp_path / precision / name}"

    model = f"model.hf_path={other}"
    honest = [start(f"{p} one", *own, cache(p, "one")) for p, own in PRECISIONS.items()]
    honest += [start(f"{p} other", *own, model, cache(p, "other")) for p, own in PRECISIONS.items()]
    (outcomes,) = launch(1, start_each, honest)
    assert {outcome.text for outcome in outcomes.values()} == {""}
    for precision in PRECISIONS:
        (path,) = (tmp_path / precision / "other").glob("*/key.json")
        key = read_key(path.parent)
        assert key is not None
        with open_store(tmp_path / precision / "forged", key) as store:
            for record in records(tmp_path / precision / "one"):
                store.append([bytes(record["digest"])], record["logps"][None])
    starts = [
        start(f"{p} {name}", *own, model, cache(p, "forged"), *data)
        for p, own in PRECISIONS.items()
        for name, data in (("complete", []), ("to complete", [more]))
    ]
    (outcomes,) = launch(1, start_each, starts)
    for name, outcome in outcomes.items():
        assert outcome.refused, (name, outcome.text)
        assert re.match(
            r".*/forged: row \d+ of train was kept with log-probs \[.*\], now they are \[.*\]\. Such rows are off by "
            r"\S+ nats per root of a token, rounding by less than \S+\. The reference's files are the same, ",
            outcome.text,
        ), (name, outcome.text)
        # A complete cache is held against the policy: its weights are the reference's.
        assert ("have log-probs" in outcome.log) == ("to complete" in name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_files_that_changed_behind_their_hashes_are_named(
    precision: str, inputs: tuple[Path, list[str]], modes: Path, tmp_path: Path
) -> None:
    """By as little as a training of four steps changes them."""
    root, words = inputs
    model, cache = shutil.copytree(root / "model", tmp_path / "model"), tmp_path / "cache"
    common = [*words, "data.tokens_per_microbatch=704", *PRECISIONS[precision], f"model.hf_path={model}"]
    common += ["reference.mode=cached", f"reference.cache_dir={cache}", "train.max_steps=1"]

    def start(name: str, *own: str) -> Start:
        return Start(name, [*common, *own, f"train.run_dir={tmp_path / name}"], tmp_path / name)

    (outcomes,) = launch(1, start_each, [start("first")])
    assert outcomes["first"].text == ""
    path, index = model / "model.safetensors", cache / "hashes.txt"
    old = index.read_text().split()[1]
    shutil.copy(modes / "resident" / "hf" / "model.safetensors", path)
    entry = f"{old} {identity_of(path)}"
    index.write_text(f"{checksum_of(entry)} {entry}\n")
    more = f"data.train_path={write_jsonl(tmp_path / 'more.jsonl', make_pairs(20, seed=7))}"
    (outcomes,) = launch(1, start_each, [start("complete"), start("to_complete", more)])
    for outcome in outcomes.values():
        assert re.search(r"What has changed is the reference's weights, .* remove hashes.txt there", outcome.text)
    # Scoring holds what it computes against what is kept.
    with pytest.raises(
        RuntimeError, match=r"row \d+ of the data was kept with log-probs .* What has changed is the ref"
    ):
        launch(1, score_pairs, [word for word in common if "max_steps" not in word], tmp_path / "scores.jsonl")
    index.unlink()
    (outcomes,) = launch(1, start_each, [start("third")])
    assert outcomes["third"].text == "" and "not used, because of the reference's weights" in outcomes["third"].log


def test_a_cache_of_another_layout_serves_where_rounding_is_large(tmp_path: Path) -> None:
    """With logits as sharp as a trained model's, two layouts in bf16 are further apart than one layout ever is."""
    model = write_tiny_model(tmp_path / "model", "llama", num_layers=8)
    path = model / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] *= 12.0
    save_file(weights, path, metadata={"format": "pt"})
    cached = [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={write_jsonl(tmp_path / 'pairs.jsonl', make_pairs(32, seed=7))}",
        *("precision.dtype=bf16", "device.kind=cpu", "trackers=[jsonl]", "data.tokens_per_microbatch=700"),
        *("train.global_batch_size=32", "reference.mode=cached", f"reference.cache_dir={tmp_path / 'cache'}"),
        "loss.beta=0.001",  # the check of step 1 is of the loss's mean, and has its own bound
    ]
    launch(2, train, [*cached, "parallel.tensor=2", f"train.run_dir={tmp_path / 'tp2'}"])
    (seen,) = launch(1, train_and_watch, [*cached, f"train.run_dir={tmp_path / 'one'}"])
    assert (seen.loaded, seen.scored) == (0, [])
    assert "another layout or library filled it, and it is used" in "\n".join(seen.log)


def test_modes_agree_in_an_interleaved_pipeline_of_a_tied_model(tmp_path: Path) -> None:
    """With named validation sets, which share pairs with each other; and a resumed run looks up what it looked up."""
    pairs = make_pairs(20, seed=3)
    sets = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", pairs[:5]), ("b", pairs[3:9]))}
    words = [
        "+model=hf",
        f"model.hf_path={write_tiny_model(tmp_path / 'model', 'qwen2', tied=True)}",
        f"data.train_path={write_jsonl(tmp_path / 'pairs.jsonl', [*pairs[8:], pairs[10]])}",
        f"data.validation_path={{{', '.join(f'{name}: {path}' for name, path in sets.items())}}}",
        *("precision.dtype=fp32", "device.kind=cpu", "trackers=[jsonl]", "data.tokens_per_microbatch=700"),
        *("parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_size=4", f"optimizer.lr={LR}"),
        *("train.save_every=2", "train.eval_every=2", "train.epochs=1"),
    ]
    starts = [
        Start(mode, [*words, f"reference.mode={mode}", f"train.run_dir={tmp_path / mode}"], tmp_path / mode)
        for mode in ("resident", "offload", "cached")
    ]
    for outcomes in launch(2, start_each, starts):
        assert {outcome.text for outcome in outcomes.values()} == {""}
    for mode in ("offload", "cached"):
        assert_bit_equal(tmp_path / "resident", tmp_path / mode)
    assert {"eval/a/loss", "eval/b/loss"} < {*metrics(tmp_path / "cached")[0]}
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "cached", resumed)
    shutil.rmtree(resumed / "hf")
    shutil.rmtree(checkpoint(resumed, 4))
    cached = ["reference.mode=cached", f"reference.cache_dir={tmp_path / 'cached' / 'reference'}"]
    for seen in launch(2, train_and_watch, [*words, *cached, "train.resume=auto", f"train.run_dir={resumed}"]):
        assert (seen.loaded, seen.scored, seen.asked) == (0, [], [])
    assert_bit_equal(tmp_path / "cached", resumed)


def test_references_that_cannot_serve_are_refused(inputs: tuple[Path, list[str]], tmp_path: Path) -> None:
    """One that computes no numbers, of which nothing is kept; one that can't follow, before data is tokenized."""
    _, words = inputs
    endless = write_tiny_model(tmp_path / "endless", "llama", num_layers=2)
    weights = load_file(endless / "model.safetensors")
    weights["lm_head.weight"] *= 1e38
    save_file(weights, endless / "model.safetensors", metadata={"format": "pt"})
    deeper = write_tiny_model(tmp_path / "deeper", "llama", num_layers=3)

    def start(name: str, *own: str) -> Start:
        return Start(name, [*words, *own, f"train.run_dir={tmp_path / name}"], tmp_path / name)

    starts = [
        start("cached", "reference.mode=cached", f"reference.hf_path={endless}"),
        start("following", "reference.sync_every=2", f"reference.hf_path={deeper}"),
    ]
    for outcomes in launch(2, start_each, starts):
        assert outcomes["cached"].refused and outcomes["following"].refused
        assert re.match(r"pair \d+ \(a row of the data, from 0\) has no finite log-probs", outcomes["cached"].text)
        assert outcomes["following"].text == (
            f"reference.sync_every=2: mixes the policy's weights into the reference's, reference.hf_path={deeper} "
            "is of another architecture: drop one of the two"
        )
    assert not records(tmp_path / "cached" / "reference") and not (tmp_path / "following" / "tokens").exists()


def test_a_loss_without_a_reference_trains_without_one(inputs: tuple[Path, list[str]]) -> None:
    root, words = inputs
    words = [word for word in words if word != LD]
    words += ["reference.mode=none", "loss.name=[simpo,sft]", "loss.beta=2.0", "train.max_steps=2"]
    for name, world, layout in (("none", 1, []), ("none_pp2", 2, ["parallel.pipeline=2"])):
        seen = launch(world, train_and_watch, [*words, *layout, f"train.run_dir={root / name}"])
        assert [watched.alive for watched in seen] == [0] * world
    assert_same_trajectory(root / "none", root / "none_pp2", lr=LR)
    for line in training_lines(root / "none"):
        assert line["memory/reference_gib"] == 0.0
        # The policy's own, per token: an untrained model has some nats on each.
        assert 2.0 * 4.0 < -line["rewards/chosen"] < 2.0 * 8.0 < -line["logps/chosen"]
    assert "eval/loss" in metrics(root / "none")[0]


# A reference that follows the policy


SYNC = ("reference.sync_every=2", "reference.sync_mix=0.5", "train.max_steps=5", "train.save_every=3")


def checkpoint(run: Path, step: int) -> str:
    return str(run / "checkpoints" / f"step_{step:08d}")


@pytest.fixture(scope="module")
def synced(inputs: tuple[Path, list[str]]) -> Path:
    """Two data ranks, weights gathered in the next forward: the reference follows after updates 2 and 4."""
    root, words = inputs
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    launch(2, train, [*words, *overlap, *SYNC, f"train.run_dir={root / 'synced'}"])
    return root


def test_the_reference_is_the_mixture(inputs: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, words = inputs
    words = [*words, "train.max_steps=2", "reference.sync_every=1", "train.save_every=1"]
    launch(1, train, [*words, "reference.sync_mix=0.25", f"train.run_dir={tmp_path / 'soft'}"])
    (first,), (second,) = (launch(1, read_checkpoint, checkpoint(tmp_path / "soft", step)) for step in (1, 2))
    for name in (name for name in first if not name.startswith("reference.")):
        mixed = 0.75 * first[f"reference.{name}"] + 0.25 * second[name]
        assert np.abs(second[f"reference.{name}"] - mixed).max() <= 1e-6 * np.abs(mixed).max(), name
    launch(1, train, [*words, "reference.sync_mix=1.0", f"train.run_dir={tmp_path / 'hard'}"])
    # With everything taken over, every update begins as the first one does.
    assert [line["loss"] for line in training_lines(tmp_path / "hard")] == pytest.approx([LN_2] * 2, abs=1e-6)
    assert training_lines(tmp_path / "soft")[1]["loss"] != pytest.approx(LN_2, abs=1e-4)


def test_an_offloaded_reference_follows_alike(inputs: tuple[Path, list[str]], synced: Path) -> None:
    root, words = inputs
    launch(2, train, [*words, *SYNC, "reference.mode=offload", f"train.run_dir={root / 'synced_offload'}"])
    assert_bit_equal(synced / "synced", root / "synced_offload")


def test_a_run_resumed_in_another_layout_has_it_too(inputs: tuple[Path, list[str]], synced: Path) -> None:
    root, words = inputs
    run = begin_again(synced / "synced", root / "resumed_tp2")
    launch(2, train, [*words, *SYNC, "train.resume=auto", "parallel.tensor=2", f"train.run_dir={run}"])
    assert_same_trajectory(synced / "synced", run, lr=LR)


def begin_again(done: Path, run: Path) -> Path:
    """A copy of a run as it was after step 3."""
    shutil.copytree(done, run)
    shutil.rmtree(run / "hf")
    shutil.rmtree(checkpoint(run, 5))
    return run


@pytest.mark.parametrize("mode", ["resident", "offload"])
def test_a_resumed_run_has_the_reference_that_it_had(mode: str, inputs: tuple[Path, list[str]], synced: Path) -> None:
    root, words = inputs
    words = [*words, *SYNC, "train.resume=auto", f"reference.mode={mode}"]
    run = begin_again(synced / "synced", root / f"resumed_{mode}")
    if mode == "resident":
        with pytest.raises(RuntimeError, match=r"reference.sync_every=null: the checkpoint was written with 2"):
            launch(2, train, [*words, "reference.sync_every=null", "reference.sync_mix=0.6", f"train.run_dir={run}"])
    launch(2, train, [*words, f"train.run_dir={run}"])
    assert_bit_equal(synced / "synced", run)


def test_the_policy_of_such_a_run_is_exported_and_a_starting_point(
    inputs: tuple[Path, list[str]], synced: Path, tmp_path: Path
) -> None:
    _, words = inputs
    words = [word for word in words if not word.startswith("model.hf_path")]
    start = f"model.checkpoint={synced / 'synced'}"
    launch(1, train, [*words, start, "train.max_steps=1", "reference.mode=cached", f"train.run_dir={tmp_path / 'run'}"])
    assert training_lines(tmp_path / "run")[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    launch(1, export_hf, synced / "synced", tmp_path / "exported")
    exported, policy = load_file(tmp_path / "exported" / "model.safetensors"), exported_weights(synced / "synced")
    assert all(torch.equal(exported[name], tensor) for name, tensor in policy.items())
