"""Messages of a conversation: their spelling in the layouts, and the rules for prompts and responses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadpo.data.json_rows import RowProblem

Message = dict[str, Any]

_SURROGATE = re.compile("[\ud800-\udfff]")
# Optional fields of a message besides role and text, which the chat template gets.
_STRINGS = ("name", "tool_call_id", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Dialect:
    """A layout's spelling of messages: the two keys, and a map from its roles to the chat template's."""

    role_key: str
    text_key: str
    roles: Mapping[str, str]


OPENAI = Dialect("role", "content", {r: r for r in ("system", "developer", "user", "assistant", "tool")})
SHAREGPT_WORDS = Dialect(
    "from",
    "value",
    {"system": "system", "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
    | {"tool": "tool", "observation": "tool"},
)


def prompt_messages(value: Sequence[Any], name: str, dialect: Dialect) -> list[Message]:
    """Parses the messages before the response; only the last one, a user's or a tool's, must have text."""
    if not value:
        raise RowProblem(f"{name} is empty, at least one message is required")
    messages = [message(item, f"{name}[{i}]", dialect) for i, item in enumerate(value)]
    check_prompt(messages, name, dialect)
    return messages


def response_messages(value: Sequence[Any], name: str, dialect: Dialect) -> list[Message]:
    """Parses the messages of one response, all of which must be the assistant's and have text or tool calls."""
    if not value:
        raise RowProblem(f"{name} is empty, one assistant message is required")
    messages = [message(item, f"{name}[{i}]", dialect) for i, item in enumerate(value)]
    check_response(messages, name, dialect)
    return messages


def split_conversations(
    chosen: Sequence[Any], rejected: Sequence[Any], names: tuple[str, str]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Splits two full conversations into (prompt, chosen, rejected): the prompt is their common beginning.

    At least one message of each remains as the response.
    """
    sides = [
        [message(item, f"{name}[{i}]", OPENAI) for i, item in enumerate(value)]
        for value, name in zip((chosen, rejected), names, strict=True)
    ]
    first, second = sides
    most = min(len(first), len(second)) - 1
    shared = next((i for i in range(most) if first[i] != second[i]), max(most, 0))
    if shared == 0:
        raise RowProblem(
            f"{names[0]} and {names[1]} share no first message, so they hold no prompt; where the prompt is a column "
            "of its own, name it in data.prompt_key"
        )
    prompt = first[:shared]
    check_prompt(prompt, f"what {names[0]} and {names[1]} share", OPENAI)
    for messages, name in zip(sides, names, strict=True):
        check_response(messages, name, OPENAI, shared)
    return prompt, first[shared:], second[shared:]


def message(value: object, name: str, dialect: Dialect) -> Message:
    """Converts a message for the chat template; its text may be empty. Raises RowProblem that begins with `name`."""
    if not isinstance(value, dict):
        raise RowProblem(f"{name} is {type_name(value)}, not an object of {dialect.role_key!r}, {dialect.text_key!r}")
    given = {key: item for key, item in value.items() if item is not None}
    calls = given.pop("tool_calls", None) or None
    for key in (dialect.role_key, dialect.text_key):
        if key not in value and not (calls and key == dialect.text_key):
            raise RowProblem(f"{name} lacks {key!r}; its keys are {', '.join(map(repr, value)) or 'none'}")
    extra = [key for key in given if key not in (dialect.role_key, dialect.text_key, *_STRINGS)]
    if extra:
        raise RowProblem(f"{name} has keys that are not read: {', '.join(map(repr, extra))}; remove them or set null")
    role = text(value[dialect.role_key], f"{name}.{dialect.role_key}")
    if role not in dialect.roles:
        raise RowProblem(f"{name}.{dialect.role_key} is {role!r}; it is one of {', '.join(dialect.roles)}")
    content = given.get(dialect.text_key, "" if calls else None)
    result: Message = {
        "role": dialect.roles[role],
        "content": text(content, f"{name}.{dialect.text_key}", may_be_empty=True),
    }
    if calls:
        if result["role"] != "assistant":
            raise RowProblem(f"{name} has tool_calls, which only the assistant makes; its role is {role!r}")
        result["tool_calls"] = list_of_objects(calls, f"{name}.tool_calls")
    return result | {key: text(given[key], f"{name}.{key}", may_be_empty=True) for key in _STRINGS if key in given}


def check_prompt(messages: Sequence[Message], name: str, dialect: Dialect) -> None:
    """Raises RowProblem unless the last message is a user's or a tool's and has text."""
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        role = spelled_role(last["role"], dialect)
        raise RowProblem(f"{name} ends with a message of {role!r}; the response follows a user or tool message")
    if not last["content"]:
        raise RowProblem(f"{name}[{len(messages) - 1}].{dialect.text_key} is empty")


def check_response(messages: Sequence[Message], name: str, dialect: Dialect, start: int = 0) -> None:
    """Raises RowProblem unless all messages from `start` on are the assistant's, with text or tool calls."""
    for i, item in enumerate(messages[start:], start):
        if item["role"] != "assistant":
            parting = f" (chosen and rejected part at message {start})" if start else ""
            role = spelled_role(item["role"], dialect)
            raise RowProblem(f"{name}[{i}] is a message of {role!r}; responses are the assistant's{parting}")
        if not item["content"] and "tool_calls" not in item:
            raise RowProblem(f"{name}[{i}].{dialect.text_key} is empty")


def spelled_role(role: str, dialect: Dialect) -> str:
    """Returns the dialect's first word for a role."""
    return next(word for word, meaning in dialect.roles.items() if meaning == role)


# -------------------------------------------------------------------------------------------------------- plain values
def type_name(value: object) -> str:
    """Returns the type of a JSON value in words."""
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def text(value: object, name: str, *, may_be_empty: bool = False) -> str:
    """Returns `value` if it is a string that a tokenizer takes; otherwise raises RowProblem that begins with `name`."""
    if not isinstance(value, str):
        raise RowProblem(f"{name} is {type_name(value)}, a string is required")
    if not value and not may_be_empty:
        raise RowProblem(f"{name} is empty")
    if "\0" in value:
        raise RowProblem(f"{name} holds a NUL character (U+0000); remove it")
    surrogate = _SURROGATE.search(value)
    if surrogate:
        raise RowProblem(f"{name} holds half a surrogate pair (U+{ord(surrogate[0]):04X}), which is not a character")
    return value


def check_texts(value: Any, name: str) -> None:
    """Raises RowProblem if a tokenizer can't take a string inside `value`, keys included."""
    if isinstance(value, str):
        text(value, name, may_be_empty=True)
    elif isinstance(value, dict):
        for key, item in value.items():
            text(key, f"a key of {name}", may_be_empty=True)
            check_texts(item, f"{name}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_texts(item, f"{name}[{i}]")


def list_of_objects(value: Any, name: str) -> list[Any]:
    """Returns `value` if it is a list of objects; otherwise raises RowProblem."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowProblem(f"{name} must be a list of objects")
    check_texts(value, name)
    return value
