"""What each layout of a row says, how a layout is recognised, and what a row that does not fit is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.data.json_rows import RowProblem
from megadpo.data.layouts import (
    IMPLICIT_CONVERSATIONAL,
    IMPLICIT_STANDARD,
    ROLL,
    SHAREGPT,
    TRL_CONVERSATIONAL,
    TRL_STANDARD,
    ULTRAFEEDBACK,
    Keys,
    Preference,
    convert,
    ignored_columns,
    recognise,
)

KEYS = Keys()


def message(role: str, content: Any, **further: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **further}


SYSTEM, USER, GOOD, BAD = (
    message("system", "s"),
    message("user", "p"),
    message("assistant", "c"),
    message("assistant", "r"),
)
STANDARD_ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
CONVERSATIONAL_ROW = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
ROLL_ROW = {"instruction": "p", "chosen": "c", "rejected": "r"}
SHAREGPT_ROW = {
    "conversations": [{"from": "human", "value": "p"}],
    "chosen": {"from": "gpt", "value": "c"},
    "rejected": {"from": "gpt", "value": "r"},
}
IMPLICIT_ROW = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
TEXT_ROW = {"chosen": "Q: p A: c", "rejected": "Q: p A: r"}
ULTRAFEEDBACK_ROW = {"prompt": "p", **IMPLICIT_ROW}

ROWS: dict[str, dict[str, Any]] = {
    TRL_STANDARD: STANDARD_ROW,
    TRL_CONVERSATIONAL: CONVERSATIONAL_ROW,
    ULTRAFEEDBACK: ULTRAFEEDBACK_ROW,
    SHAREGPT: SHAREGPT_ROW,
    ROLL: ROLL_ROW,
    IMPLICIT_CONVERSATIONAL: IMPLICIT_ROW,
    IMPLICIT_STANDARD: TEXT_ROW,
}
PLAIN = (TRL_STANDARD, IMPLICIT_STANDARD)
WITH_MESSAGES = [layout for layout in ROWS if layout not in PLAIN]


def said(row: Any, layout: str | None = None) -> Preference:
    return convert(row, KEYS, layout)


def refused(row: Any, *words: str, layout: str | None = None) -> None:
    """Checks that the row is a RowProblem whose message holds all `words`."""
    with pytest.raises(RowProblem) as caught:
        convert(row, KEYS, layout)
    for word in words:
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------------- what they say
@pytest.mark.parametrize("layout", ROWS)
def test_each_layout_is_recognised_and_read(layout: str) -> None:
    assert recognise(ROWS[layout], KEYS) == layout
    expected = {TRL_STANDARD: ("p", "c", "r"), IMPLICIT_STANDARD: ("Q: p A:", " c", " r")}
    preference = said(ROWS[layout], layout)
    assert (preference.prompt, preference.chosen, preference.rejected) == expected.get(layout, ([USER], [GOOD], [BAD]))
    assert ignored_columns({**ROWS[layout], "id": 1, "gone": None}, KEYS, layout) == ["id"]


@pytest.mark.parametrize("layout", ROWS)
def test_null_columns_of_a_table_change_nothing(layout: str) -> None:
    absent = dict.fromkeys(["system", "tools", "chat_template_kwargs", "input", "history", "images"])
    row = {**absent, **ROWS[layout]}
    if layout == IMPLICIT_STANDARD:  # two strings beside a column that may be their prompt: better asked than guessed
        refused(row, "no known layout", "input (null)", "data.prompt_key")
    else:
        assert said(row) == said(ROWS[layout])
    if layout in (SHAREGPT, ROLL, IMPLICIT_CONVERSATIONAL):
        assert recognise({**row, "prompt": None}, KEYS) == layout


def test_own_column_names() -> None:
    keys = Keys("q", "good", "bad")
    assert convert({"q": "p", "good": "c", "bad": "r"}, keys, None) == Preference("p", "c", "r")
    assert recognise({"instruction": "p", "good": "c", "bad": "r"}, keys) == ROLL
    assert recognise({"good": [USER, GOOD], "bad": [USER, BAD]}, keys) == IMPLICIT_CONVERSATIONAL
    assert recognise({"question": "p", **STANDARD_ROW}, Keys("question")) == TRL_STANDARD


def test_the_prompt_column_wins_over_other_layouts() -> None:
    row = {**STANDARD_ROW, "instruction": "not read"}
    assert (recognise(row, KEYS), said(row).prompt) == (TRL_STANDARD, "p")
    assert ignored_columns(row, KEYS, TRL_STANDARD) == ["instruction"]


@pytest.mark.parametrize("layout", WITH_MESSAGES)
def test_system_tools_and_template_arguments_are_read_with_messages(layout: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    kwargs = {"enable_thinking": False, "gone": None}
    row = {**ROWS[layout], "system": "s", "tools": tools, "chat_template_kwargs": kwargs}
    preference = said(row)
    assert preference == Preference([SYSTEM, USER], [GOOD], [BAD], tools, {"enable_thinking": False})
    assert ignored_columns(row, KEYS, layout) == []
    as_text = {**row, "tools": json.dumps(tools), "chat_template_kwargs": json.dumps(kwargs)}
    assert said(as_text) == preference
    assert said({**row, "system": "", "tools": "", "chat_template_kwargs": {}}) == said(ROWS[layout])


@pytest.mark.parametrize("layout", PLAIN)
def test_with_plain_text_those_columns_are_ignored(layout: str) -> None:
    row = {**ROWS[layout], "system": "s", "tools": [{}], "chat_template_kwargs": {"a": 1}}
    assert said(row) == said(ROWS[layout])
    assert ignored_columns(row, KEYS, layout) == ["system", "tools", "chat_template_kwargs"]


@pytest.mark.parametrize(("context", "prompt"), [("x", "p\nx"), ("", "p"), (None, "p")])
def test_roll_input_follows_the_instruction(context: str | None, prompt: str) -> None:
    row = {**ROLL_ROW, "input": context}
    assert said(row).prompt == [message("user", prompt)]
    assert ignored_columns(row, KEYS, ROLL) == []


def test_roll_history_comes_before_the_instruction() -> None:
    turns = [["a", "b"], ["c", "d"]]
    roles = ["user", "assistant", "user", "assistant", "user"]
    expected = [message(role, text) for role, text in zip(roles, "abcdp", strict=True)]
    for history in (turns, json.dumps(turns)):
        assert said({**ROLL_ROW, "history": history, "system": "s"}).prompt == [SYSTEM, *expected]


def test_messages_keep_what_the_template_may_read() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    prompt = [
        message("system", ""),
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        message("tool", "t", name="f", tool_call_id="1", tool_calls=None),
    ]
    answers = [message("assistant", "c", reasoning_content="hm"), {"role": "assistant", "tool_calls": [call]}]
    preference = said({"prompt": prompt, "chosen": [answers[0]], "rejected": [answers[1]]})
    assert preference.prompt == [
        message("system", ""),
        USER,
        message("assistant", "", tool_calls=[call]),
        message("tool", "t", name="f", tool_call_id="1"),
    ]
    assert (preference.chosen, preference.rejected) == ([answers[0]], [message("assistant", "", tool_calls=[call])])


def test_sharegpt_words_become_roles() -> None:
    words = ["system", "human", "gpt", "user", "assistant", "tool", "observation"]
    row = {**SHAREGPT_ROW, "conversations": [{"from": word, "value": word} for word in words]}
    roles = ["system", "user", "assistant", "user", "assistant", "tool", "tool"]
    assert said(row).prompt == [message(role, word) for role, word in zip(roles, words, strict=True)]


# ----------------------------------------------------------------------------------------------------- implicit prompts
TEXT_SPLITS = {
    "a word": ("The sky is blue.", "The sky is green.", "The sky is"),
    "never inside a word": ("The sky is big", "The sky is blue", "The sky is"),
    "a line break is kept whole": ("Q?\n\nA: yes", "Q?\n\nB: no", "Q?"),
    "one has more space": ("a b", "a  c", "a"),
    "other space": ("a\tb", "a b", "a"),
    "space against letter": ("say ab c", "say abx c", "say"),
    "equal": ("p q c", "p q c", "p q"),
    "one begins the other": ("p q", "p q r", "p"),
    "final space": ("p q ", "p q  ", "p"),
}


@pytest.mark.parametrize("name", TEXT_SPLITS)
def test_text_is_split_before_the_word_in_which_it_parts(name: str) -> None:
    chosen, rejected, prompt = TEXT_SPLITS[name]
    for row in ({"chosen": chosen, "rejected": rejected}, {"chosen": rejected, "rejected": chosen}):
        preference = said(row)
        assert preference.prompt == prompt
        assert isinstance(preference.chosen, str) and isinstance(preference.rejected, str)
        assert (prompt + preference.chosen, prompt + preference.rejected) == (row["chosen"], row["rejected"])


@given(st.text(alphabet="ab \n", min_size=1, max_size=12), st.text(alphabet="ab \n", min_size=1, max_size=12))
def test_text_splits_hold_their_promises(chosen: str, rejected: str) -> None:
    try:
        preference = said({"chosen": chosen, "rejected": rejected})
    except RowProblem:
        return
    prompt = preference.prompt
    assert isinstance(prompt, str) and isinstance(preference.chosen, str) and isinstance(preference.rejected, str)
    assert prompt + preference.chosen == chosen and prompt + preference.rejected == rejected
    assert prompt.rstrip() == prompt != ""
    assert preference.chosen[0].isspace() and preference.rejected[0].isspace()
    assert preference.chosen.strip() and preference.rejected.strip()


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("yes", "no"), ("same", "same"), ("  a", "  b"), (" ", " "), ("a", "a b")]
)
def test_text_with_no_first_word_in_common_is_refused(chosen: str, rejected: str) -> None:
    refused({"chosen": chosen, "rejected": rejected}, "no first word in common", "data.prompt_key")


def test_conversations_are_split_where_they_part() -> None:
    earlier = [SYSTEM, message("user", "a"), message("assistant", "b"), USER]
    preference = said({"chosen": [*earlier, GOOD], "rejected": [*earlier, BAD]})
    assert (preference.prompt, preference.chosen, preference.rejected) == (earlier, [GOOD], [BAD])
    equal = said({"chosen": [USER, GOOD], "rejected": [USER, {**GOOD, "tool_calls": None}]})
    assert (equal.prompt, equal.chosen, equal.rejected) == ([USER], [GOOD], [GOOD])
    longer = said({"chosen": [USER, GOOD], "rejected": [USER, GOOD, BAD]})
    assert (longer.prompt, longer.chosen, longer.rejected) == ([USER], [GOOD], [GOOD, BAD])


BAD_CONVERSATIONS = {
    "nothing shared": ([USER, GOOD], [message("user", "q"), BAD], ["share no first message", "data.prompt_key"]),
    "one message": ([USER], [USER, BAD], ["share no first message"]),
    "no message": ([], [USER, BAD], ["share no first message"]),
    "they part early": ([USER, GOOD, USER, GOOD], [USER, BAD, USER, BAD], ["chosen[2]", "'user'", "part at message 1"]),
    "shared answer": ([USER, GOOD, GOOD], [USER, GOOD, BAD], ["share ends with a message of 'assistant'"]),
    "empty answer": ([USER, message("assistant", "")], [USER, BAD], ["chosen[1].content is empty"]),
    "empty prompt": ([message("user", ""), GOOD], [message("user", ""), BAD], ["share[0].content is empty"]),
}


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_conversations_that_hold_no_prompt_are_refused(name: str) -> None:
    chosen, rejected, words = BAD_CONVERSATIONS[name]
    refused({"chosen": chosen, "rejected": rejected}, *words)


def test_the_prompt_string_must_be_a_shared_message() -> None:
    earlier = [message("user", "a"), message("assistant", "b"), USER]
    row = {"prompt": "a", "chosen": [*earlier, GOOD], "rejected": [*earlier, BAD]}
    assert said(row).prompt == earlier  # the first message of several turns, as in UltraFeedback
    refused({**row, "prompt": "other"}, "prompt is none of the 3 messages")
    refused({"prompt": "p", "chosen": [GOOD], "rejected": [BAD]}, "share no first message")


# ------------------------------------------------------------------------------------------------------ rows that fail
ASKED = message("user", "p", tool_calls=[{"name": "f"}])
BAD_ROWS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "missing key": (
        TRL_STANDARD,
        {"prompt": "p", "chosen": "c"},
        ["lacks 'rejected'", "TRL standard", "chosen (a string)"],
    ),
    "missing prompt": (TRL_STANDARD, TEXT_ROW, ["lacks 'prompt'", "TRL standard"]),
    "wrong type": (TRL_STANDARD, {**STANDARD_ROW, "chosen": 3}, ["another type", "chosen (a number)"]),
    "bytes": (TRL_STANDARD, {**STANDARD_ROW, "chosen": b"c"}, ["another type", "chosen (a bytes)"]),
    "null": (TRL_STANDARD, {**STANDARD_ROW, "prompt": None}, ["another type", "prompt (null)"]),
    "mixed": (
        TRL_STANDARD,
        CONVERSATIONAL_ROW,
        ["layout TRL conversational in a file whose first rows are mostly TRL standard"],
    ),
    "mixed with ROLL": (
        TRL_STANDARD,
        ROLL_ROW,
        ["layout ROLL instruction in a file whose first rows are mostly TRL standard"],
    ),
    "mixed with text": (IMPLICIT_STANDARD, IMPLICIT_ROW, ["another type", "chosen (a list)"]),
    "empty prompt": (TRL_STANDARD, {**STANDARD_ROW, "prompt": ""}, ["prompt is empty"]),
    "empty response": (TRL_STANDARD, {**STANDARD_ROW, "rejected": ""}, ["rejected is empty"]),
    "NUL": (TRL_STANDARD, {**STANDARD_ROW, "prompt": "a\0"}, ["prompt", "NUL"]),
    "surrogate": (TRL_STANDARD, {**STANDARD_ROW, "chosen": "\ud83d"}, ["chosen", "U+D83D"]),
    "ROLL input": (ROLL, {**ROLL_ROW, "input": 3}, ["input is a number"]),
    "ROLL empty": (ROLL, {**ROLL_ROW, "instruction": ""}, ["instruction is empty"]),
    "ROLL history": (ROLL, {**ROLL_ROW, "history": [["a"]]}, ["history must be a list of [user, assistant]"]),
    "ROLL turn": (ROLL, {**ROLL_ROW, "history": [["a", None]]}, ["history[0][1] is null"]),
    "no messages": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "prompt": []}, ["prompt is empty"]),
    "no response": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "chosen": []}, ["chosen is empty"]),
    "empty message": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "chosen": [message("assistant", "")]},
        ["chosen[0].content is empty"],
    ),
    "empty turn": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "prompt": [message("user", "")]},
        ["prompt[0].content is empty"],
    ),
    "response role": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "rejected": [USER]}, ["rejected[0]", "'user'"]),
    "second response": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "rejected": [BAD, USER]}, ["rejected[1]", "'user'"]),
    "prompt end": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "prompt": [USER, GOOD]}, ["prompt ends", "'assistant'"]),
    "role": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "prompt": [message("bot", "p")]},
        ["'bot'", "system, developer, user"],
    ),
    "role type": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "prompt": [message([], "p")]}, ["role is a list"]),
    "no content": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "prompt": [{"role": "user"}]}, ["lacks 'content'"]),
    "null content": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "prompt": [message("user", None)]},
        ["content is null"],
    ),
    "text parts": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "prompt": [message("user", ["p"])]},
        ["content is a list"],
    ),
    "not a message": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "prompt": ["p"]}, ["prompt[0] is a string"]),
    "unknown key": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "prompt": [message("user", "p", weight=0)]},
        ["prompt[0]", "not read: 'weight'"],
    ),
    "user's tool call": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "prompt": [ASKED]}, ["prompt[0]", "tool_calls"]),
    "tool calls": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "chosen": [message("assistant", "c", tool_calls="f")]},
        ["chosen[0].tool_calls must be a list of objects"],
    ),
    "NUL in a tool call": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "chosen": [message("assistant", "c", tool_calls=[{"f": ["\0"]}])]},
        ["chosen[0].tool_calls[0].f[0]", "NUL"],
    ),
    "two system messages": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "prompt": [SYSTEM, USER], "system": "t"},
        ["system message already"],
    ),
    "system type": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "system": ["s"]}, ["system is a list"]),
    "tools": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "tools": ["f"]}, ["tools must be a list of objects"]),
    "tools text": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "tools": "f("}, ["tools", "not valid JSON"]),
    "template arguments": (TRL_CONVERSATIONAL, {**CONVERSATIONAL_ROW, "chat_template_kwargs": [1]}, ["is a list"]),
    "taken argument": (
        TRL_CONVERSATIONAL,
        {**CONVERSATIONAL_ROW, "chat_template_kwargs": {"tokenize": False}},
        ["chat_template_kwargs must not hold tokenize"],
    ),
    "speaker": (SHAREGPT, {**SHAREGPT_ROW, "conversations": [{"from": "bot", "value": "p"}]}, ["'bot'", "human, gpt"]),
    "speaker key": (SHAREGPT, {**SHAREGPT_ROW, "conversations": [USER]}, ["lacks 'from'", "'role', 'content'"]),
    "last speaker": (SHAREGPT, {**SHAREGPT_ROW, "conversations": [SHAREGPT_ROW["chosen"]]}, ["a message of 'gpt'"]),
    "chosen speaker": (SHAREGPT, {**SHAREGPT_ROW, "chosen": {"from": "human", "value": "c"}}, ["chosen", "'human'"]),
    "two values": (SHAREGPT, {**SHAREGPT_ROW, "chosen": {"from": "gpt", "value": None}}, ["value is null"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_does_not_fit_is_told_why(name: str) -> None:
    layout, row, words = BAD_ROWS[name]
    refused(row, *words, layout=layout)


@pytest.mark.parametrize("row", [3, ["p", "c", "r"], "p", None])
def test_a_row_that_is_no_object_is_told_so(row: Any) -> None:
    refused(row, "a pair is a JSON object")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "The p", "chosen": "The c", "rejected": "The r"},
        {"prompt": "p", "chosen": "c"},
        {"prompt": "p", "chosen": [USER, GOOD], "rejected": "r"},
        {"instruction": "p", "chosen": GOOD, "rejected": BAD},
        {"conversations": [USER], "chosen": "c", "rejected": "r"},
        {"chosen": 1, "rejected": 2},
    ],
)
def test_an_unknown_layout_names_the_columns_and_the_layouts(row: dict[str, Any]) -> None:
    refused(row, "no known layout", *row, *ROWS, "data.prompt_key")


# ------------------------------------------------------------------------------------------------------ documentation
def test_the_documented_examples_are_read_as_their_headings_say() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^### ([^\n]+)\n\n```json\n(.+?)```", page, re.MULTILINE | re.DOTALL)
    assert {layout: recognise(json.loads(text), KEYS) for layout, text in examples} == {name: name for name in ROWS}
    for _, text in examples:
        row = json.loads(text)
        assert ignored_columns(row, KEYS, str(recognise(row, KEYS))) == []
        preference = said(row)
        answers = [
            side if isinstance(side, str) else side[-1]["content"] for side in (preference.chosen, preference.rejected)
        ]
        assert [answer.strip()[0] for answer in answers] == ["4", "5"]
