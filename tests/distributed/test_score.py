"""Scores at every layout are transformers' own log-probs, and a scoring that was killed goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.conversion_jobs import (
    export_hf,
    import_hf,
    score_and_die,
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


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".summary.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_what_transformers_says(
    name: str, inputs: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    model, data, words = inputs
    world, layout = LAYOUTS[name]
    out = tmp_path / "scores.jsonl"
    log, *_ = launch(world, score_pairs, [*words, *layout], out)
    assert f"the longest sequence has {MAX_LENGTH} tokens, the model was made for 100: lower data.max_length" in log

    pairs = tokenized_pairs(data, model, max_length=MAX_LENGTH)
    assert 0 < len(pairs) < 24
    expected = pair_logps(model, pairs)
    scored = lines(out)
    assert [list(line) for line in scored] == [
        ["index", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
    ] * len(pairs)
    for line, pair in zip(scored, pairs, strict=True):
        assert (line["index"], line["chosen_tokens"], line["rejected_tokens"]) == (
            pair.index,
            len(pair.chosen),
            len(pair.rejected),
        )
        assert (line["chosen_logp"], line["rejected_logp"]) == pytest.approx(expected[pair.index], rel=1e-4)

    told = summary(out)
    assert (told["pairs"], told["dropped"]) == (len(pairs), 24 - len(pairs))
    assert told["mean_chosen_logp"] == pytest.approx(sum(line["chosen_logp"] for line in scored) / len(scored))
    higher = sum(line["chosen_logp"] > line["rejected_logp"] for line in scored)
    assert told["share_chosen_higher"] == pytest.approx(higher / len(scored))
    assert told["scored_tokens"] == sum(line["chosen_tokens"] + line["rejected_tokens"] for line in scored)
    assert told["pairs_scored_in_this_run"] == len(pairs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.jsonl", "scores.summary.json"]


@pytest.fixture(scope="module")
def scored(inputs: tuple[Path, Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "scores.jsonl"
    launch(1, score_pairs, inputs[2], out)
    return out


def test_a_killed_scoring_goes_on(inputs: tuple[Path, Path, list[str]], scored: Path, tmp_path: Path) -> None:
    """Byte for byte the uninterrupted one's; meanwhile another model is refused."""
    *_, words = inputs
    out = tmp_path / "scores.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        launch(1, score_and_die, words, out, 2)
    left = tmp_path / "scores.jsonl.partial" / "scores.jsonl"
    with left.open("a") as file:
        file.write('{"index": 9, "cho')
    assert len(left.read_text().splitlines()) == 2 * 5 + 1 + 1
    with pytest.raises(RuntimeError, match=r"scores of another model or other data: .*\n  dtype: fp32 then, bf16 now"):
        launch(1, score_pairs, [*words, "precision.dtype=bf16"], out)
    launch(1, score_pairs, words, out)
    assert out.read_bytes() == scored.read_bytes()
    assert summary(out)["pairs_scored_in_this_run"] == len(lines(out)) - 2 * 5
    assert summary(out)["mean_chosen_logp"] == summary(scored)["mean_chosen_logp"]


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


def test_a_finished_scoring_stays_as_it_is(inputs: tuple[Path, Path, list[str]], scored: Path) -> None:
    _, data, words = inputs
    files = [scored, scored.with_suffix(".summary.json")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    launch(2, score_pairs, [*words, "parallel.tensor=2"], scored)  # the layout is not part of the identity
    with pytest.raises(RuntimeError, match=r"scores\.jsonl holds scores of another model or other data(.|\n)*  data: "):
        launch(1, score_pairs, [*words, "data.max_length=40"], scored)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert sorted(path.name for path in scored.parent.iterdir()) == ["scores.jsonl", "scores.summary.json"]

    stranger = data.with_name("theirs.jsonl")
    stranger.write_text("not a score\n")
    with pytest.raises(RuntimeError, match=r"theirs\.jsonl: the file is there already: remove it, or give another"):
        launch(1, score_pairs, words, stranger)
    assert stranger.read_text() == "not a score\n"
