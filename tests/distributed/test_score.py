"""Scores at every layout are transformers' own log-probs, and a scoring that was killed goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megadpo.commands.score_summary import Buckets
from tests.helpers.jobs.conversion import (
    export_hf,
    import_hf,
    refused_scorings,
    score_and_die,
    score_in_turns,
    score_pairs,
    score_where_nothing_can_be_written,
)
from tests.helpers.launch import launch
from tests.helpers.naive import pair_logps
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.tokenized import tokenized_pairs

MAX_LENGTH = 250
BETA = 0.3
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "tp2_pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pp2_vpp2_dp2": (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A tied model of odd vocabulary, pairs some of which are cut or dropped, and the words that score them.

    The model has gone from Hugging Face to a checkpoint, back, and to a checkpoint again.
    """
    root = tmp_path_factory.mktemp("score")
    model = write_tiny_model(root / "model", "qwen2", tied=True)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(24, seed=5))
    launch(2, import_hf, model, root / "first")
    launch(1, export_hf, root / "first", root / "back")
    # Made for fewer positions than the pairs have: a log-prob depends on them no less, so that is a warning.
    config = root / "back" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 100}))
    launch(1, import_hf, root / "back", root / "second")
    words = [
        "+model=hf",
        f"model.checkpoint={root / 'second'}",
        f"data.train_path={data}",
        f"data.max_length={MAX_LENGTH}",
        "data.tokens_per_microbatch=700",
        "train.global_batch_size=5",
        "precision.dtype=fp32",
        "device.kind=cpu",
    ]
    return model, data, words


@pytest.fixture(scope="module")
def reference(inputs: tuple[Path, Path, list[str]]) -> tuple[Path, list[str]]:
    """Another model of another family, with the same tokens, and the words that score the pairs with both."""
    directory = write_tiny_model(inputs[0].with_name("reference"), "llama", seed=7, hidden=32)
    return directory, [*inputs[2], f"reference.hf_path={directory}", f"loss.beta={BETA}"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".summary.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_what_transformers_says(
    name: str, inputs: tuple[Path, Path, list[str]], reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """One layout without a reference, all others with one."""
    model, data, words = inputs
    world, layout = LAYOUTS[name]
    out = tmp_path / "scores.jsonl"
    log, *_ = launch(world, score_pairs, [*(reference[1] if layout else words), *layout], out)
    assert f"the longest sequence has {MAX_LENGTH} tokens, the model was made for 100: lower data.max_length" in log
    assert "\npairs: 24 read, " in log and "\nthe first pair as the model sees it" in log and "training" not in log

    pairs = tokenized_pairs(data, model, max_length=MAX_LENGTH)
    assert 0 < len(pairs) < 24
    expected = {index: list(logps) for index, logps in pair_logps(model, pairs).items()}
    keys = ["chosen_logp", "rejected_logp"]
    if layout:
        keys += ["reference_chosen_logp", "reference_rejected_logp"]
        for index, logps in pair_logps(reference[0], pairs).items():
            expected[index] += logps
    scored = lines(out)
    assert {frozenset(line) for line in scored} == {
        frozenset(["index", *keys, "chosen_tokens", "rejected_tokens", *(["reward_margin"] if layout else [])])
    }
    for line, pair in zip(scored, pairs, strict=True):
        assert (line["index"], line["chosen_tokens"], line["rejected_tokens"]) == (
            pair.index,
            len(pair.chosen),
            len(pair.rejected),
        )
        found = [line[key] for key in keys]
        assert found == pytest.approx(expected[pair.index], rel=1e-4)
        if layout:
            chosen, rejected, reference_chosen, reference_rejected = found
            margin = BETA * ((chosen - rejected) - (reference_chosen - reference_rejected))
            assert line["reward_margin"] == pytest.approx(margin, abs=1e-9)

    told = summary(out)
    assert (told["model"], told.get("reference")) == ("second", "reference" if layout else None)
    assert (told["pairs"], told["dropped"]) == (len(pairs), 24 - len(pairs))
    assert told["logps/chosen"] == pytest.approx(sum(line["chosen_logp"] for line in scored) / len(scored))
    higher = sum(line["chosen_logp"] > line["rejected_logp"] for line in scored)
    assert told["logps/accuracies"] == pytest.approx(higher / len(scored))
    if layout:
        margins = [line["reward_margin"] for line in scored]
        assert told["rewards/margins"] == pytest.approx(sum(margins) / len(scored))
        assert told["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / len(scored))
    assert told["scored_tokens"] == sum(line["chosen_tokens"] + line["rejected_tokens"] for line in scored)
    assert told["pairs_scored_in_this_run"] == len(pairs)
    assert sum(row["pairs"] for row in told["buckets"]["rows"]) == len(pairs) and len(told["buckets"]["rows"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.jsonl", "scores.summary.json"]


@pytest.fixture(scope="module")
def scored(reference: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished scoring with both models, of which one was in memory at a time."""
    out = tmp_path_factory.mktemp("whole") / "scores.jsonl"
    assert launch(1, score_in_turns, reference[1], out) == [[0, 0]]
    return out


def test_a_killed_scoring_goes_on(
    inputs: tuple[Path, Path, list[str]], reference: tuple[Path, list[str]], scored: Path, tmp_path: Path
) -> None:
    """Killed under the model, then under the reference: byte for byte the uninterrupted one's lines.

    Meanwhile other models are refused, and what differs is said.
    """
    *_, words = reference
    out, total = tmp_path / "scores.jsonl", len(lines(scored))
    with pytest.raises(RuntimeError, match="died without a word"):
        launch(1, score_and_die, words, out, 2)
    left = tmp_path / "scores.jsonl.partial"
    with (left / "scores.jsonl").open("a") as file:
        file.write('{"index": 9, "cho')
    assert len((left / "scores.jsonl").read_text().splitlines()) == 2 * 5 + 1 + 1
    other = reference[0].with_name("model")
    cases = {
        "dtype: fp32 then, bf16 now": [*words, "precision.dtype=bf16"],
        "reference: beta: 0.3 then, 0.2 now": [*words, "loss.beta=0.2"],
        f"reference: model: {reference[0]} then, {other} now": [*words, f"reference.hf_path={other}"],
        f"reference: model: {reference[0]} then, None now": inputs[2],
    }
    (refusals,) = launch(1, refused_scorings, list(cases.values()), out)
    for expected, said in zip(cases, refusals, strict=True):
        assert "holds scores of another model or other data" in said and f"\n  {expected}" in said

    groups = -(-(total - 2 * 5) // 5)
    with pytest.raises(RuntimeError, match="died without a word"):
        launch(1, score_and_die, words, out, groups + 1)
    assert len((left / "scores.jsonl").read_text().splitlines()) == total % 5 + total // 5 * 5 and total % 5
    launch(1, score_pairs, words, out)
    assert out.read_bytes() == scored.read_bytes()
    told = summary(out)
    assert (told["pairs_scored_in_this_run"], told["reference_pairs_scored_in_this_run"]) == (0, total - 5)
    assert told["rewards/margins"] == summary(scored)["rewards/margins"]


def test_every_rank_says_that_nothing_can_be_written(inputs: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    words = [*inputs[2], "parallel.pipeline=2"]
    said = launch(2, score_where_nothing_can_be_written, words, tmp_path / "scores.jsonl")
    assert said == ["no place for lines"] * 2


def test_damaged_weights_are_found_before_the_data_is_read(
    inputs: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    model, _, words = inputs
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    words = [word for word in words if not word.startswith("model.")]
    with pytest.raises(RuntimeError, match=r"damaged/model\.safetensors cannot be read: "):
        launch(1, score_pairs, [*words, f"model.hf_path={damaged}"], tmp_path / "scores.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_finished_scoring_stays_as_it_is(
    inputs: tuple[Path, Path, list[str]], reference: tuple[Path, list[str]], scored: Path
) -> None:
    data, words = inputs[1], reference[1]
    files = [scored, scored.with_suffix(".summary.json")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    launch(2, score_pairs, [*words, "parallel.tensor=2"], scored)  # the layout is not part of the identity
    (said,) = launch(1, refused_scorings, [[*words, "data.max_length=40"]], scored)
    assert "scores.jsonl holds scores of another model or other data" in said[0] and "\n  data: " in said[0]
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert sorted(path.name for path in scored.parent.iterdir()) == ["scores.jsonl", "scores.summary.json"]

    launch(1, score_pairs, words, scored, Buckets(by="stream", edges=(100,)))
    assert (scored.read_bytes(), scored.stat().st_mtime_ns) == before[0]
    was, now = json.loads(before[1][0]), summary(scored)
    rows = now.pop("buckets")["rows"]
    assert [(row["from"], row["below"]) for row in rows] == [(0, 100), (100, None)]
    assert sum(row["pairs"] for row in rows) == was["pairs"] and all(row["pairs"] for row in rows)
    was.pop("buckets")
    assert now == was

    stranger = data.with_name("theirs.jsonl")
    stranger.write_text("not a score\n")
    with pytest.raises(RuntimeError, match=r"theirs\.jsonl: the file is there already: remove it, or give another"):
        launch(1, score_pairs, words, stranger)
    assert stranger.read_text() == "not a score\n"
