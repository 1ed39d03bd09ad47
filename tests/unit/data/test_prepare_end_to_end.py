"""Generated rows, from files to batches: every pair is there, in order and with the right mask, or counted as lost.

What a row comes to is worked out here a second time, with text and lists: rendered by hand, compared token by token.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megadpo.data import prepare
from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import BatchBuilder, BatchShape, evaluation_batches
from megadpo.data.store import PairCounts, PairView, select_pairs
from megadpo.errors import DataError
from megadpo.metrics.flops import FlopRates
from tests.helpers.tokenized import recipe
from tests.helpers.tokenizers import CHATML_TEMPLATE, byte_tokenizer

Row = dict[str, Any]
Ids = list[int]
Triple = tuple[Ids, Ids, Ids]
Turns = list[tuple[str, str]]

MODES = ["keep_start", "keep_end", "drop", "error"]
PLAIN = ["standard", "implicit text"]
LAYOUTS = [*PLAIN, "conversational", "prompt string", "sharegpt", "instruction", "implicit"]
# Merges, so that some responses start before the end of the prompt.
TOKENIZER = byte_tokenizer(merges=[("a", "b"), ("b", "b"), (".", "c")], chat_template=CHATML_TEMPLATE)
JUNK = [b"{", b"3", b"{}", b"[]", b'{"chosen": 1}', b'"\xff"', b'{"chosen": "\\ud800"}']
TEXT = st.text(st.sampled_from("abc é✓\n\u2028\ufeff<,\"'\\"), min_size=1, max_size=12)


@dataclass(frozen=True)
class Said:
    """What a good row says: the turns of the prompt (plain text: one), and the two responses."""

    turns: Turns
    chosen: str
    rejected: str
    plain: bool


@st.composite
def good_rows(draw: st.DrawFn, layout: str) -> tuple[Row, Said]:
    """A row of the layout, and what it says."""
    first, second = draw(st.permutations("cr"))  # the prompt's last token merges with c
    prompt, chosen, rejected = draw(TEXT) + ".", first + draw(TEXT), second + draw(TEXT)
    if layout == "standard":
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, Said([("", prompt)], chosen, rejected, True)
    if layout == "implicit text":
        chosen, rejected = f" {chosen}", f" {rejected}"
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        return row, Said([("", prompt)], chosen, rejected, True)
    earlier = [("user", draw(TEXT)), ("assistant", draw(TEXT))] if draw(st.booleans()) else []
    turns = [*earlier, ("user", prompt)]
    messages = [{"role": role, "content": text} for role, text in turns]
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    words = {"user": "human", "assistant": "gpt"}
    by_layout: dict[str, Row] = {
        "conversational": {"prompt": messages, "chosen": answers[0], "rejected": answers[1]},
        "prompt string": {"prompt": prompt, "chosen": messages + answers[0], "rejected": messages + answers[1]},
        "implicit": {"chosen": messages + answers[0], "rejected": messages + answers[1]},
        "instruction": {
            "instruction": prompt,
            "history": json.dumps([[text for _, text in earlier]] if earlier else []),
            "chosen": chosen,
            "rejected": rejected,
        },
        "sharegpt": {
            "conversations": [{"from": words[role], "value": text} for role, text in turns],
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected},
        },
    }
    system = draw(st.sampled_from(["", "s"]))
    return {**by_layout[layout], "system": system}, Said(
        [("system", system)] * bool(system) + turns, chosen, rejected, False
    )


@st.composite
def sources(draw: st.DrawFn) -> tuple[str, bytes | list[Row], list[Said | None]]:
    """(suffix, content, what each row says, None where it is bad) of one source."""
    layout = draw(st.sampled_from(LAYOUTS))
    flat = [".csv"] if layout in [*PLAIN, "instruction"] else []
    suffix = draw(st.sampled_from([".jsonl", ".json", ".parquet", *flat]))
    rows: list[Row | bytes] = []
    said: list[Said | None] = []
    for _ in range(draw(st.integers(1, 5))):
        row, meaning = draw(good_rows(layout))
        bad = draw(st.sampled_from([None] * 5 + ["empty", "junk"]))
        if bad == "junk" and suffix == ".jsonl":
            rows.append(draw(st.sampled_from(JUNK)))
        else:
            rows.append({**row, "rejected": None} if bad else row)
        said.append(None if bad else meaning)
    if suffix == ".jsonl":
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        blank = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
        return suffix, draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + blank.join(lines), said
    return suffix, [row for row in rows if isinstance(row, dict)], said


def write(path: Path, content: bytes | list[Row]) -> str:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    return str(path)


# --------------------------------------------------------------------------------------------------- the second working
def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Ids:
    ids: Ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def rendered(said: Said) -> tuple[str, str, str]:
    """Prompt, and prompt with each response, as the model sees them."""
    if said.plain:
        prompt = "<s>" + said.turns[0][1]
        return prompt, f"{prompt}{said.chosen}</s>", f"{prompt}{said.rejected}</s>"
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said.turns) + "<|im_start|>assistant\n"
    return prompt, f"{prompt}{said.chosen}<|im_end|>\n", f"{prompt}{said.rejected}<|im_end|>\n"


def split(said: Said) -> Triple:
    """Token ids of the prompt that all three renderings begin with, and of what follows it."""
    prompt, chosen, rejected = (encode(TOKENIZER, text) for text in rendered(said))
    shared = 0
    while shared < min(map(len, (prompt, chosen, rejected))) and prompt[shared] == chosen[shared] == rejected[shared]:
        shared += 1
    return prompt[:shared], chosen[shared:], rejected[shared:]


def cut(pair: Triple, limit: int, mode: str) -> Triple | None:
    """What is kept of a pair, None where it is dropped."""
    prompt, chosen, rejected = pair
    if mode == "keep_start":
        room = limit - len(prompt)
        return (prompt, chosen[:room], rejected[:room]) if room > 0 else None
    excess = max(0, len(prompt) + max(len(chosen), len(rejected)) - limit)
    if mode == "keep_end":
        return (prompt[excess:], chosen, rejected) if excess < len(prompt) else None
    return pair if excess == 0 else None


def edge_of(pair: Triple | None, edge: str, mode: str) -> int:
    """The length limit at which this pair is just cut or lost by the mode, fits exactly, or does not notice it."""
    if pair is None or edge == "far":
        return 2000
    prompt, longest = len(pair[0]), max(map(len, pair[1:]))
    lost = {"keep_start": prompt, "keep_end": longest}
    return lost[mode] if edge == "cut" and mode in lost else prompt + longest - (edge == "cut")


# --------------------------------------------------------------------------------------------------- what the code does
@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(directory)
    return directory


def unpacked(batch: PreferenceBatch) -> dict[int, Triple]:
    """(prompt, scored chosen, scored rejected) of each pair: what the rows that predict them see, and their targets."""
    rows, targets, belongs = (t.tolist() for t in (batch.response_rows_N, batch.targets_N, batch.sequence_index_N))
    found: dict[int, Triple] = {}
    for pair, index in enumerate(batch.pair_indices):
        sides = []
        for sequence in (pair, batch.num_pairs + pair):
            own = [i for i, owner in enumerate(belongs) if owner == sequence]
            assert len(own) == batch.response_tokens_S[sequence]
            prompt, response = seen_from(batch, rows[own[0]]), [targets[i] for i in own]
            for done, i in enumerate(own):
                assert seen_from(batch, rows[i]) == prompt + response[:done]
            sides.append((prompt, response))
        (prompt, chosen), (again, rejected) = sides
        assert prompt == again
        found[index] = (prompt, chosen, rejected)
    assert len(rows) == sum(len(chosen) + len(rejected) for _, chosen, rejected in found.values())
    return found


def seen_from(batch: PreferenceBatch, row: int) -> list[int]:
    """The tokens that a row attends to, itself last; their positions count from 0."""
    (segment,) = (s for s in batch.plan.segments if s.start <= row < s.stop)
    *before, (start, _) = segment.key_ranges
    spans = [slice(*span) for span in before] + [slice(start, row + 1)]
    positions = [position for span in spans for position in batch.positions_T[span].tolist()]
    assert positions == list(range(len(positions)))
    return [token for span in spans for token in batch.tokens_1T[0, span].tolist()]


def batched(pairs: PairView, group_size: int, data_size: int, budget: int, share_prompt: bool) -> dict[int, Triple]:
    """All pairs as the data-parallel ranks get them, in the data's order."""
    found: dict[int, Triple] = {}
    order: list[int] = []
    for rank in range(data_size):
        shape = BatchShape(rank, data_size, token_multiple=4, fixed_streams=False, microbatch_multiple=1)
        builder = BatchBuilder(
            shape=shape,
            tokens_per_microbatch=budget,
            pad_token_id=0,
            share_prompt=share_prompt,
            flop_rates=FlopRates(per_token=10, per_key=1, per_response_token=5),
        )
        batches = list(evaluation_batches(pairs, group_size=group_size, builder=builder))
        order = [index for batch in batches for index in batch.pair_indices]
        for batch in batches:
            for microbatch in batch.microbatches:
                own = unpacked(microbatch)
                assert not found.keys() & own.keys()  # a pair is on one rank, once
                found |= own
    assert sorted(found) == sorted(order)
    return {index: found[index] for index in order}


def check_counts(counts: PairCounts, mode: str, whole: Sequence[Triple | None], kept: dict[int, Triple]) -> None:
    """Each number, from the pairs before and after the cut."""
    bad = whole.count(None)
    assert (counts.read, counts.kept, counts.skipped) == (len(whole), len(kept), bad)
    dropped = [counts.dropped_long_prompt, counts.dropped_long_response, counts.dropped_too_long]
    assert dropped == [(len(whole) - bad - len(kept)) * (mode == cause) for cause in ("keep_start", "keep_end", "drop")]
    assert counts.dropped_empty_response == 0
    shortened = [
        [len(after) < len(before) for before, after in zip(whole[i] or (), pair, strict=True)]
        for i, pair in kept.items()
    ]
    told = [counts.truncated_prompt, counts.truncated_chosen, counts.truncated_rejected]
    assert told == [sum(column) for column in zip(*shortened, strict=True)]
    assert counts.duplicate == len(kept) - len({json.dumps(whole[i]) for i in kept})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    given_sources=st.lists(sources(), min_size=1, max_size=2),
    edge=st.sampled_from(["cut", "cut", "fits", "far"]),
    beyond=st.integers(0, 1),
    mode=st.sampled_from(MODES),
    group_size=st.integers(1, 4),
    data_size=st.integers(1, 3),
    budget=st.sampled_from([1, 150, 4096]),
    share_prompt=st.booleans(),
)
def test_every_pair_comes_through_in_order_with_its_mask_or_is_counted(
    tokenizer_dir: Path,
    given_sources: list[tuple[str, bytes | list[Row], list[Said | None]]],
    edge: str,
    beyond: int,
    mode: str,
    group_size: int,
    data_size: int,
    budget: int,
    share_prompt: bool,
) -> None:
    said = [row for _, _, rows in given_sources for row in rows]
    whole = [None if row is None else split(row) for row in said]
    limit = edge_of(next((pair for pair in whole if pair is not None), None), edge, mode) + beyond
    expected = [None if pair is None else cut(pair, limit, mode) for pair in whole]
    kept = {index: pair for index, pair in enumerate(expected) if pair is not None}
    too_long = mode == "error" and any(pair is not None and i not in kept for i, pair in enumerate(whole))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths = [write(directory / f"{number}{suffix}", rows) for number, (suffix, rows, _) in enumerate(given_sources)]
        how = recipe(tokenizer_dir, skip_bad_rows=True)
        with mock.patch.object(prepare, "_CHUNK_ROWS", 2):
            made = prepare.prepare_store(
                paths, how, cache_dir=directory / "c", workers=1, report=lambda share, rows: None
            )
        store = prepare.open_store(made)

        def select() -> PairView:
            return select_pairs(store, np.arange(len(store)), max_length=limit, truncation=mode, title="test pairs")

        if too_long or not kept:
            with pytest.raises(DataError, match="data.truncation=error" if too_long else "none of the"):
                select()
            return
        pairs = select()
        found = batched(pairs, group_size, data_size, budget, share_prompt)
        check_counts(pairs.counts, mode, whole, kept)
        assert len(store.report.problems) == said.count(None)
    assert list(found) == list(kept)
    assert found == kept
    for index, (prompt, *responses) in found.items():
        row = said[index]
        if row is not None and whole[index] == kept[index]:
            texts = [TOKENIZER.decode(prompt + ids, clean_up_tokenization_spaces=False) for ids in responses]
            assert texts == list(rendered(row)[1:])
