"""Rows of files with what they must be read as: pairs that are dressed in a layout, and rows that are spoiled.

The pair comes first and the row is made of it, so that what a row means is known without the readers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Messages = list[dict[str, Any]]

_LETTERS = [*"abcXYZ 09.,:;!?'\"\\/{}[]<>|%$#@\t\n\r", "\r\n", "\x1b", "\x7f", "\x85", "\xa0", "\xad", "é", "e\u0301"]
_LETTERS += [
    "ß",
    "İ",
    "\u200b",
    "\u200d",
    "\u2028",
    "\u2029",
    "\u202e",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "\ue000",
    "中",
    "ا",
]
_LETTERS += ["\U0001f600", "\U0001f468\u200d\U0001f469", "\U0010ffff", "</s>", "null", "\\u0000", "\\ud800", "{{", "%s"]
_WORDS = [letter for letter in _LETTERS if not any(c.isspace() for c in letter)]


@dataclass(frozen=True)
class Said:
    """What a row says."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: Any = None


def text(rng: random.Random) -> str:
    """Some odd characters; one in some thousands has a megabyte of them."""
    if rng.random() < 0.0002:
        return rng.choice(_WORDS) * 2**20
    return "".join(rng.choices(_LETTERS, k=rng.randint(1, 12)))


def word(rng: random.Random) -> str:
    """Some odd characters without a space."""
    return "".join(rng.choices(_WORDS, k=rng.randint(1, 6)))


def anything(rng: random.Random, depth: int = 3) -> Any:
    """A JSON value."""
    flat = [None, True, False, 0, -1, 2**63, 10**400, -0.0, 1e308, "", " ", "\0", "\ud800", [], {}, text(rng)]
    if depth == 0 or rng.random() < 0.6:
        return rng.choice(flat)
    inner = [anything(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return inner if rng.random() < 0.5 else {rng.choice(["role", "content", "from", "value", "x"]): i for i in inner}


# ------------------------------------------------------------------------------------------------------------- layouts
def _prompt(rng: random.Random) -> Messages:
    system = [{"role": rng.choice(["system", "developer"]), "content": text(rng)}] * (rng.random() < 0.3)
    turns = [{"role": role, "content": text(rng)} for _ in range(rng.randint(0, 2)) for role in ("user", "assistant")]
    return [*system, *turns, {"role": "user", "content": text(rng)}]


def _responses(rng: random.Random) -> tuple[Messages, Messages]:
    """Of one or two messages each, which differ from the first character on."""
    more = [{"role": "assistant", "content": text(rng)}] * (rng.random() < 0.2)
    chosen, rejected = ([{"role": "assistant", "content": f"{mark}{text(rng)}"}] for mark in "cr")
    return [*chosen, *more], rejected


def _standard(rng: random.Random) -> tuple[Row, Said]:
    said = Said(text(rng), text(rng), text(rng))
    return {"prompt": said.prompt, "chosen": said.chosen, "rejected": said.rejected}, said


def _implicit_text(rng: random.Random) -> tuple[Row, Said]:
    prompt = " ".join(word(rng) for _ in range(rng.randint(1, 4)))
    gap = rng.choice([" ", "\n", "\n\n", "\u2003"])
    said = Said(prompt, f"{gap}c{text(rng)}", f"{gap}r{text(rng)}")
    return {"chosen": f"{prompt}{said.chosen}", "rejected": f"{prompt}{said.rejected}"}, said


def _conversational(rng: random.Random) -> tuple[Row, Said]:
    prompt, (chosen, rejected) = _prompt(rng), _responses(rng)
    return _with_columns(
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}, Said(prompt, chosen, rejected), rng
    )


def _implicit_conversational(rng: random.Random) -> tuple[Row, Said]:
    prompt, (chosen, rejected) = _prompt(rng), _responses(rng)
    row = {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}
    return _with_columns(row, Said(prompt, chosen, rejected), rng)


def _ultrafeedback(rng: random.Random) -> tuple[Row, Said]:
    row, said = _implicit_conversational(rng)
    assert isinstance(said.prompt, list)
    return {"prompt": said.prompt[-1]["content"], **row}, said


def _sharegpt(rng: random.Random) -> tuple[Row, Said]:
    words = {"system": ["system"], "user": ["human", "user"], "assistant": ["gpt", "assistant"]}
    prompt = [item for item in _prompt(rng) if item["role"] != "developer"]
    chosen, rejected = ([{"role": "assistant", "content": text(rng)}] for _ in range(2))

    def spelled(messages: Messages) -> Messages:
        return [{"from": rng.choice(words[item["role"]]), "value": item["content"]} for item in messages]

    row = {"conversations": spelled(prompt), "chosen": spelled(chosen)[0], "rejected": spelled(rejected)[0]}
    return _with_columns(row, Said(prompt, chosen, rejected), rng)


def _roll(rng: random.Random) -> tuple[Row, Said]:
    instruction, chosen, rejected = (text(rng) for _ in range(3))
    row: Row = {"instruction": instruction, "chosen": chosen, "rejected": rejected}
    prompt: Messages = []
    if rng.random() < 0.5:
        turns = [[text(rng), text(rng)] for _ in range(rng.randint(0, 2))]
        row["history"] = json.dumps(turns) if rng.random() < 0.5 else turns
        prompt = [{"role": r, "content": t} for turn in turns for r, t in zip(("user", "assistant"), turn, strict=True)]
    if rng.random() < 0.5:
        row["input"] = rng.choice(["", None, text(rng)])
        instruction = f"{instruction}\n{row['input']}" if row["input"] else instruction
    prompt.append({"role": "user", "content": instruction})
    answers = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    return _with_columns(row, Said(prompt, *answers), rng)


def _with_columns(row: Row, said: Said, rng: random.Random) -> tuple[Row, Said]:
    """The row with columns that change what it says, and what it says then."""
    prompt, tools = list(said.prompt), None
    if rng.random() < 0.3 and not any(item["role"] in ("system", "developer") for item in prompt):
        row["system"] = rng.choice(["", None, text(rng)])
        prompt = [{"role": "system", "content": row["system"]}, *prompt] if row["system"] else prompt
    if rng.random() < 0.2:
        tools = [{"name": text(rng), "parameters": {"x": rng.choice([None, 1, 1.5, [text(rng)]])}}]
        row["tools"] = json.dumps(tools) if rng.random() < 0.5 else tools
    return row, Said(prompt, said.chosen, said.rejected, tools)


LAYOUTS: dict[str, Callable[[random.Random], tuple[Row, Said]]] = {
    "TRL standard": _standard,
    "TRL conversational": _conversational,
    "prompt string with full conversations": _ultrafeedback,
    "ShareGPT": _sharegpt,
    "ROLL instruction": _roll,
    "implicit prompt, conversational": _implicit_conversational,
    "implicit prompt, plain text": _implicit_text,
}


# ------------------------------------------------------------------------------------------------------- rows as bytes
def dressed(row: Row, rng: random.Random, *, ignored: bool = True) -> bytes:
    """The row as JSON on one line: columns in any order, escaped or not, with spaces or without."""
    if ignored and rng.random() < 0.3:
        row = {**row, "score": rng.choice([0, 1.5, 10**400, [[1]], {"a": None}, text(rng)])}
    items = list(row.items())
    rng.shuffle(items)
    separators = rng.choice([(",", ":"), (", ", ": "), (" \t,", "\t: ")])
    line = json.dumps(dict(items), ensure_ascii=rng.random() < 0.5, separators=separators)
    return (rng.choice(["", " ", "\t"]) + line + rng.choice(["", " "])).encode("utf-8")


def _column(row: Row, rng: random.Random) -> str:
    """A column that no layout with it does without."""
    return rng.choice(
        [name for name in ("prompt", "conversations", "instruction", "chosen", "rejected") if name in row]
    )


def _without(row: Row, rng: random.Random) -> Any:
    name = _column(row, rng)
    return {key: value for key, value in row.items() if key != name}


def _other_type(row: Row, rng: random.Random) -> Any:
    return {**row, _column(row, rng): rng.choice([None, True, 0, -1.5, 10**400, [], {}, [[]], [None], {"x": []}, [{}]])}


def _other_text(row: Row, rng: random.Random) -> Any:
    """Half a surrogate pair, a NUL or nothing, in the place of a text or of one inside a conversation."""
    bad = rng.choice(["", "\0", "a\0b", "\ud83d", "a\udfffb"])
    name = _column(row, rng)
    value = row[name]
    if isinstance(value, str):
        return {**row, name: bad}
    if isinstance(value, dict):
        return {**row, name: {**value, "value": bad}}
    last = value[-1]
    return {**row, name: [*value[:-1], {**last, "value" if "value" in last else "content": bad}]}


def _no_row(row: Row, rng: random.Random) -> Any:
    return rng.choice([None, True, 3, 1.5, "prompt", [], [row], [[]], list(row), {}, {"a": row}])


_VALUES = (_without, _other_type, _other_text, _no_row)


def spoiled_value(row: Row, rng: random.Random) -> bytes:
    """JSON that holds no pair of the layout."""
    return json.dumps(rng.choice(_VALUES)(row, rng), ensure_ascii=True).encode()


def spoiled_line(row: Row, rng: random.Random) -> bytes:
    """A line that holds no pair: not JSON, not text, or JSON that is no pair."""
    good = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8")
    inside = good.index(b'": ') + 1  # the end of the first column's name
    kinds: list[Callable[[], bytes]] = [
        lambda: spoiled_value(row, rng),
        lambda: good[: rng.randint(1, len(good) - 1)],
        lambda: good[:-1] + b', "score": ' + rng.choice([b"NaN", b"Infinity", b"-Infinity", b"9" * 5000]) + b"}",
        lambda: good[:-1] + b", " + json.dumps({(name := _column(row, rng)): row[name]}).encode()[1:],
        lambda: (
            good[: inside - 1] + rng.choice([b"\0", b"\x1f", b"\xff", b"\xc3", b"\xed\xa0\x80"]) + good[inside - 1 :]
        ),
        lambda: good + rng.choice([good, b",", b"}", b"x", b"\0"]),
        lambda: rng.choice([b"[", b'{"a":']) * rng.choice([1, 2_000, 20_000]),
        lambda: b"x" + rng.randbytes(rng.randint(0, 30)).replace(b"\n", b"").replace(b"\r", b""),
        lambda: good.replace(b'"', b"'"),
        lambda: b"\xef\xbb\xbf" + good,
    ]
    return rng.choice(kinds)()
