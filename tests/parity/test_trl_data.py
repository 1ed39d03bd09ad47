"""The token ids of a file are those that TRL's own preparation gives for its rows, and where they differ on purpose.

TRL runs without a model: `DPOTrainer._prepare_dataset` extracts prompts, appends end tokens, renders and tokenizes.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megadpo.data.tokenization import tokenize_pair
from megadpo.errors import DataError
from tests.helpers.pairs import read_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tokenizers import (
    BOS_TEMPLATE,
    CHATML_TEMPLATE,
    DATE_TEMPLATE,
    DEFAULT_SYSTEM_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    REWRITING_TEMPLATE,
    TOOLS_TEMPLATE,
    TRIMMING_TEMPLATE,
    byte_tokenizer,
)

pytest.importorskip("trl", minversion="1.16", reason="TRL is the oracle of these tests")

Row = dict[str, Any]
Ids = tuple[list[int], list[int], list[int]]


def trl_ids(rows: list[Row], tokenizer: Any) -> list[Ids]:
    """(prompt, chosen, rejected) token ids of each row as TRL prepares them."""
    from datasets import Dataset
    from trl import DPOTrainer

    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    arguments: Any = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    prepared = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, arguments, "train")
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in prepared]


def our_ids(rows: list[Row], tokenizer: Any, directory: Path, template_date: date | None = None) -> list[Ids]:
    """The same of a file with these rows."""
    path = write_jsonl(directory / "rows.jsonl", rows)
    pairs = [tokenize_pair(pair, tokenizer, template_date=template_date).pair for pair in read_pairs(path)]
    return [(pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()) for pair in pairs]


def texts(tokenizer: Any, ids: Ids) -> list[str]:
    return [tokenizer.decode(part) for part in ids]


def message(role: str, content: str, **further: Any) -> Row:
    return {"role": role, "content": content, **further}


def conversation(*turns: str) -> list[Row]:
    return [message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]


PLAIN = [
    {"prompt": "What is 2+2?", "chosen": " 4.", "rejected": " 5, I think."},
    {"prompt": "xa", "chosen": "b and more", "rejected": "c"},  # a + b merge across the boundary
    {"prompt": "ends by itself: ", "chosen": "yes</s>", "rejected": "no</s> "},
    {"prompt": "é", "chosen": "naïve ✓", "rejected": "\n"},
]
IMPLICIT_PLAIN = [
    {"chosen": "Human: hello there. Assistant: Hi!", "rejected": "Human: hello there. Assistant: Go away."},
    {"chosen": "The sky is blue", "rejected": "The sky is green and wide"},
]
TURNS = [("hi ", " yo ", "\nno"), ("a", "<think>\nhm\n</think>\n\nb", "c", "yes", "<think>x</think>no")]
CONVERSATIONS = [
    {"prompt": conversation(*turns), "chosen": [message("assistant", c)], "rejected": [message("assistant", r)]}
    for *turns, c, r in TURNS
]
IMPLICIT = [{side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")} for row in CONVERSATIONS] + [
    {"chosen": conversation("q", "same"), "rejected": conversation("q", "same")}
]
WITH_SYSTEM = [{**row, "prompt": [message("system", " s "), *row["prompt"]]} for row in CONVERSATIONS]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "integer"}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
WITH_TOOLS = [
    {
        "prompt": [
            message("user", "add"),
            message("assistant", "", tool_calls=[CALL]),
            message("tool", "2", name="add"),
        ],
        "chosen": [message("assistant", "two")],
        "rejected": [message("assistant", "again", tool_calls=[CALL])],
        "tools": json.dumps([TOOL]),
    }
]
NO_THINKING = [{**row, "chat_template_kwargs": {"enable_thinking": False}} for row in CONVERSATIONS]
REASONED = [{**row, "chosen": [message("assistant", "c", reasoning_content="hm")]} for row in CONVERSATIONS]

CASES: dict[str, tuple[list[Row], str | None]] = {
    "plain": (PLAIN, None),
    "implicit plain": (IMPLICIT_PLAIN, None),
    "conversational": (CONVERSATIONS, CHATML_TEMPLATE),
    "implicit conversational": (IMPLICIT, CHATML_TEMPLATE),
    "bos inside the template": (CONVERSATIONS, BOS_TEMPLATE),
    "implicit, bos inside the template": (IMPLICIT, BOS_TEMPLATE),
    "default system prompt": (CONVERSATIONS, DEFAULT_SYSTEM_TEMPLATE),
    "system prompt over a default": (WITH_SYSTEM, DEFAULT_SYSTEM_TEMPLATE),
    "no system role": (CONVERSATIONS, NO_SYSTEM_TEMPLATE),
    "trimming": (WITH_SYSTEM, TRIMMING_TEMPLATE),
    "rewriting history": (CONVERSATIONS, REWRITING_TEMPLATE),
    "rewriting history, implicit": (IMPLICIT, REWRITING_TEMPLATE),
    "rewriting history, no thinking": (NO_THINKING, REWRITING_TEMPLATE),
    "reasoning": (REASONED, REWRITING_TEMPLATE),
    "tools": (WITH_TOOLS, TOOLS_TEMPLATE),
    "date": (CONVERSATIONS, DATE_TEMPLATE),
}


@pytest.mark.parametrize("case", CASES)
def test_token_ids_are_those_of_trl(case: str, tmp_path: Path) -> None:
    rows, template = CASES[case]
    tokenizer = byte_tokenizer(merges=[("a", "b"), ("n", "d")], chat_template=template)
    ours = our_ids(rows, tokenizer, tmp_path, template_date=date.today())
    assert ours == trl_ids(rows, tokenizer)
    assert all(all(ids) for ids in ours)


def test_the_other_layouts_are_the_conversations_that_they_spell(tmp_path: Path) -> None:
    """ROLL's and ShareGPT's rows and the columns `system` and `history`, which TRL doesn't read."""
    answers = {"chosen": [message("assistant", "c")], "rejected": [message("assistant", "r")]}
    system = message("system", "s")
    spelled = {"chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}}
    turns = [{"from": speaker, "value": text} for speaker, text in (("human", "a"), ("gpt", "b"), ("human", "q"))]
    pairs: list[tuple[Row, Row]] = [
        (
            {"instruction": "q", "input": "i", "chosen": "c", "rejected": "r", "system": "s"},
            {"prompt": [system, message("user", "q\ni")], **answers},
        ),
        (
            {"instruction": "q", "history": [["a", "b"]], "chosen": "c", "rejected": "r"},
            {"prompt": conversation("a", "b", "q"), **answers},
        ),
        (
            {"conversations": turns, **spelled, "system": "s", "tools": json.dumps([TOOL])},
            {"prompt": [system, *conversation("a", "b", "q")], **answers, "tools": json.dumps([TOOL])},
        ),
        (
            {"prompt": conversation("q"), **answers, "system": "s"},
            {"prompt": [system, *conversation("q")], **answers},
        ),
    ]
    tokenizer = byte_tokenizer(chat_template=TOOLS_TEMPLATE)
    for ours, theirs in pairs:
        assert our_ids([ours], tokenizer, tmp_path) == trl_ids([theirs], tokenizer)


def test_a_template_without_a_system_role_refuses_the_row(tmp_path: Path) -> None:
    from jinja2 import TemplateError

    tokenizer = byte_tokenizer(chat_template=NO_SYSTEM_TEMPLATE)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template refuses .*System role not supported"):
        our_ids(WITH_SYSTEM, tokenizer, tmp_path)
    with pytest.raises(TemplateError, match="System role not supported"):
        trl_ids(WITH_SYSTEM, tokenizer)


def test_the_date_can_be_pinned(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=DATE_TEMPLATE)
    (ids, _) = our_ids(CONVERSATIONS, tokenizer, tmp_path, template_date=date(2024, 2, 29))
    assert texts(tokenizer, ids)[0].startswith("<s><|system|>Today: 29 Feb 2024<|end|>")


# ------------------------------------------------------------------------------------- where TRL is known to be wrong
def test_trl_cuts_an_implicit_prompt_inside_a_word(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [{"chosen": "The sky is big", "rejected": "The sky is blue"}]
    assert texts(tokenizer, trl_ids(rows, tokenizer)[0]) == ["<s>The sky is b", "ig</s>", "lue</s>"]
    assert texts(tokenizer, our_ids(rows, tokenizer, tmp_path)[0]) == ["<s>The sky is", " big</s>", " blue</s>"]


def test_trl_leaves_line_breaks_in_an_implicit_prompt(tmp_path: Path) -> None:
    """Not wrong, but its own rule for " " alone; here all space before a word belongs to the response."""
    tokenizer = byte_tokenizer()
    rows = [{"chosen": "Q?\n\nyes", "rejected": "Q?\n\nno"}]
    assert texts(tokenizer, trl_ids(rows, tokenizer)[0]) == ["<s>Q?\n\n", "yes</s>", "no</s>"]
    assert texts(tokenizer, our_ids(rows, tokenizer, tmp_path)[0]) == ["<s>Q?", "\n\nyes</s>", "\n\nno</s>"]


def test_trl_tells_conversations_by_the_order_of_a_set(tmp_path: Path) -> None:
    """A prompt string beside conversations is one or the other to TRL, as the seed of Python's hashes has it."""
    from trl.data_utils import is_conversational, maybe_extract_prompt

    class Column(str):
        """A name with a hash of its own, which decides the order of a set."""

        place: int

        def __hash__(self) -> int:
            return self.place

        __eq__ = str.__eq__

    def as_trl_sees(row: Row, names: list[str]) -> Row:
        keys = [Column(name) for name in row]
        for key in keys:
            key.place = names.index(key)
        return dict(zip(keys, row.values(), strict=True))

    rows = [{"prompt": row["chosen"][0]["content"], **row} for row in IMPLICIT]
    orders = (["prompt", "chosen", "rejected"], ["chosen", "prompt", "rejected"])
    assert [is_conversational(as_trl_sees(rows[0], names)) for names in orders] == [False, True]
    tokenizer = byte_tokenizer(chat_template=CHATML_TEMPLATE)
    ours = our_ids(rows, tokenizer, tmp_path)
    assert ours == trl_ids([maybe_extract_prompt(row) for row in rows], tokenizer) == trl_ids(IMPLICIT, tokenizer)


def test_trl_doubles_the_bos_of_a_rendered_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=BOS_TEMPLATE)
    prompt = tokenizer.apply_chat_template(conversation("q"), tokenize=False, add_generation_prompt=True)
    rows = [{"prompt": prompt, "chosen": "c", "rejected": "r"}]
    bos = tokenizer.bos_token_id
    (theirs,), (ours,) = trl_ids(rows, tokenizer), our_ids(rows, tokenizer, tmp_path)
    assert theirs[0][:2] == [bos, bos]
    assert ours == (theirs[0][1:], theirs[1], theirs[2])
    assert ours[0].count(bos) == 1
