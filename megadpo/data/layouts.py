"""The layouts of preference rows: recognises a row's layout, and converts rows to a prompt and two responses.

The layout follows from the columns and their types, tried in the order of `recognise`; a null column that a layout does
not need counts as absent, since tables have every column in every row. A row that does not fit is a RowProblem.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadpo.data.json_rows import RowProblem
from megadpo.data.messages import (
    OPENAI,
    SHAREGPT_WORDS,
    Message,
    check_texts,
    list_of_objects,
    prompt_messages,
    response_messages,
    split_conversations,
    text,
    type_name,
)

TRL_STANDARD = "TRL standard"
TRL_CONVERSATIONAL = "TRL conversational"
ULTRAFEEDBACK = "prompt string with full conversations"
SHAREGPT = "ShareGPT"
ROLL = "ROLL instruction"
IMPLICIT_CONVERSATIONAL = "implicit prompt, conversational"
IMPLICIT_STANDARD = "implicit prompt, plain text"

# Columns that change the model's input in other trainers; if they are not read, a warning is logged.
CONTEXT_COLUMNS = {"conversations", "history", "images", "input", "instruction", "messages", "system", "tools"}
CONTEXT_COLUMNS |= {"audios", "chat_template_kwargs", "image", "prompt", "videos"}
# If a row has one of these beside two strings, the strings are responses to it, and a common prefix is chance.
_LOOKS_LIKE_A_PROMPT = {"conversations", "input", "instruction", "messages", "problem", "query", "question"}
# Arguments of the chat template that rendering a pair sets itself, so that a row can't.
_RENDERING = {"add_generation_prompt", "continue_final_message", "conversation", "max_length", "messages", "padding"}
_RENDERING |= {"return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tools", "truncation"}
_RENDERING |= {"chat_template", "tokenizer_kwargs"}


# Layouts with a prompt column, by the types of prompt, chosen and rejected.
_BY_TYPES: dict[tuple[type, ...], str] = {
    (str, str, str): TRL_STANDARD,
    (list, list, list): TRL_CONVERSATIONAL,
    (str, list, list): ULTRAFEEDBACK,
}


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of a row's columns, which must differ."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True, slots=True)
class Preference:
    """The content of a row: three strings (plain text), or three lists of messages and arguments of the template."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


def recognise(row: Mapping[str, Any], keys: Keys) -> str | None:
    """Returns the layout that follows from the row's columns and their types, or None."""
    responses = (type(row.get(keys.chosen)), type(row.get(keys.rejected)))
    if row.get(keys.prompt) is not None:
        return _BY_TYPES.get((type(row[keys.prompt]), *responses))
    if isinstance(row.get("conversations"), list) and responses == (dict, dict):
        return SHAREGPT
    if isinstance(row.get("instruction"), str) and responses == (str, str):
        return ROLL
    if responses == (list, list):
        return IMPLICIT_CONVERSATIONAL
    if responses == (str, str) and keys.prompt not in row and not _LOOKS_LIKE_A_PROMPT & row.keys():
        return IMPLICIT_STANDARD
    return None


def ignored_columns(row: Mapping[str, Any], keys: Keys, layout: str) -> list[str]:
    """Names of the row's columns that are not null and not read by `layout`."""
    read = {*_required(keys, layout), *_optional(layout)}
    return [name for name, value in row.items() if name not in read and value is not None]


def convert(row: object, keys: Keys, layout: str | None) -> Preference:
    """Converts a row; `layout` is that of its source, None if it is not known. Raises RowProblem."""
    if not isinstance(row, dict):
        suffix = "; a file that is one array of pairs must have the suffix .json" if isinstance(row, list) else ""
        raise RowProblem(f"a pair is a JSON object, this is {type_name(row)}{suffix}")
    layout = _same_layout(row, keys, layout)
    if layout == TRL_STANDARD:
        prompt_text, one, other = (text(row[name], name) for name in (keys.prompt, keys.chosen, keys.rejected))
        return Preference(prompt_text, one, other)
    if layout == IMPLICIT_STANDARD:
        return _split_text(text(row[keys.chosen], keys.chosen), text(row[keys.rejected], keys.rejected), keys)
    prompt, chosen, rejected = _conversations(row, keys, layout)
    return Preference(
        _with_system(prompt, row),
        chosen,
        rejected,
        _tools(_decoded(row, "tools")),
        _template_kwargs(_decoded(row, "chat_template_kwargs")),
    )


# ------------------------------------------------------------------------------------------------------------- columns
_PROMPT_COLUMNS = {ROLL: "instruction", SHAREGPT: "conversations"}


def _required(keys: Keys, layout: str) -> list[str]:
    if layout in (IMPLICIT_CONVERSATIONAL, IMPLICIT_STANDARD):
        return [keys.chosen, keys.rejected]
    return [_PROMPT_COLUMNS.get(layout, keys.prompt), keys.chosen, keys.rejected]


def _optional(layout: str) -> list[str]:
    if layout in (TRL_STANDARD, IMPLICIT_STANDARD):
        return []
    return ["system", "tools", "chat_template_kwargs", *(["input", "history"] if layout == ROLL else [])]


def _same_layout(row: Mapping[str, Any], keys: Keys, layout: str | None) -> str:
    """Returns the row's layout; raises RowProblem if it has none, or another one than the file's (`layout`)."""
    found = recognise(row, keys)
    if found is not None and layout in (None, found):
        return found
    columns = ", ".join(f"{name} ({type_name(value)})" for name, value in row.items()) or "none"
    if layout is not None:
        if found not in (None, IMPLICIT_CONVERSATIONAL, IMPLICIT_STANDARD):
            raise RowProblem(
                f"layout {found} in a file whose first rows are mostly {layout}; one file holds one layout: split it"
            )
        missing = ", ".join(repr(key) for key in sorted(set(_required(keys, layout)) - row.keys()))
        fault = f"the row lacks {missing}" if missing else "a column has another type than the layout has"
        raise RowProblem(f"{fault}; the file's layout is {layout}, the row's columns are {columns}")
    raise RowProblem(f"no known layout; columns found: {columns}. Layouts: {_layouts_in_words(keys)}")


def _layouts_in_words(keys: Keys) -> str:
    prompt, chosen, rejected = keys.prompt, keys.chosen, keys.rejected
    return (
        f"{TRL_STANDARD} ({prompt}, {chosen}, {rejected}: strings); {TRL_CONVERSATIONAL} (the same three: lists of "
        f"role/content messages); {ULTRAFEEDBACK} ({prompt}: a string, {chosen}, {rejected}: lists of messages, one of "
        f"which is the prompt); {SHAREGPT} (conversations: list of from/value messages, {chosen}, {rejected}: one such "
        f"message each); {ROLL} (instruction, {chosen}, {rejected}: strings, input, history: optional); "
        f"{IMPLICIT_CONVERSATIONAL} ({chosen}, {rejected}: lists of messages that begin with the prompt); "
        f"{IMPLICIT_STANDARD} ({chosen}, {rejected}: strings that begin with the prompt, and no other column that may "
        "be it). Other column names go into data.prompt_key, data.chosen_key, data.rejected_key"
    )


def _decoded(row: Mapping[str, Any], name: str) -> Any:
    """The column's value, parsed as JSON if it is a string; None if it is absent, null or empty."""
    value = row.get(name)
    if not isinstance(value, str) or not value:
        return value or None
    try:
        return json.loads(value) or None
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"{name} is a string that is not valid JSON: {error}") from None


def _tools(value: Any) -> list[Any] | None:
    return None if value is None else list_of_objects(value, "tools")


def _template_kwargs(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise RowProblem(f"chat_template_kwargs is {type_name(value)}, an object is required")
    taken = ", ".join(sorted(_RENDERING & value.keys()))
    if taken:
        raise RowProblem(f"chat_template_kwargs must not hold {taken}, which is decided by what is rendered; remove it")
    check_texts(value, "chat_template_kwargs")
    return {key: item for key, item in value.items() if item is not None} or None


def _with_system(prompt: list[Message], row: Mapping[str, Any]) -> list[Message]:
    system = row.get("system")
    if system in (None, ""):
        return prompt
    if any(message["role"] in ("system", "developer") for message in prompt):
        raise RowProblem(
            "there is a system column, and the conversation has a system message already; keep one of them"
        )
    return [{"role": "system", "content": text(system, "system")}, *prompt]


# ------------------------------------------------------------------------------------------------------- conversations
def _conversations(
    row: Mapping[str, Any], keys: Keys, layout: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns (prompt, chosen, rejected) of a row in one of the conversational layouts."""
    chosen, rejected = row[keys.chosen], row[keys.rejected]
    if layout == ROLL:
        prompt = [*_history(_decoded(row, "history")), {"role": "user", "content": _instruction(row)}]
        return prompt, _assistant(text(chosen, keys.chosen)), _assistant(text(rejected, keys.rejected))
    if layout == SHAREGPT:
        prompt, chosen, rejected = row["conversations"], [chosen], [rejected]
        return (
            prompt_messages(prompt, "conversations", SHAREGPT_WORDS),
            response_messages(chosen, keys.chosen, SHAREGPT_WORDS),
            response_messages(rejected, keys.rejected, SHAREGPT_WORDS),
        )
    if layout == TRL_CONVERSATIONAL:
        return (
            prompt_messages(row[keys.prompt], keys.prompt, OPENAI),
            response_messages(chosen, keys.chosen, OPENAI),
            response_messages(rejected, keys.rejected, OPENAI),
        )
    shared, chosen, rejected = split_conversations(chosen, rejected, (keys.chosen, keys.rejected))
    if layout == ULTRAFEEDBACK and all(message["content"] != row[keys.prompt] for message in shared):
        raise RowProblem(
            f"{keys.prompt} is none of the {len(shared)} messages that {keys.chosen} and {keys.rejected} share; the "
            "column would not be read: remove it, or make it the prompt's message"
        )
    return shared, chosen, rejected


def _instruction(row: Mapping[str, Any]) -> str:
    instruction, context = text(row["instruction"], "instruction"), row.get("input")
    return instruction if context in (None, "") else f"{instruction}\n{text(context, 'input')}"


def _history(turns: Any) -> list[Message]:
    """Messages of the instruction layout's history, whose turns are [user, assistant]."""
    if turns is None:
        return []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise RowProblem("history must be a list of [user, assistant] pairs, or the JSON text of one")
    return [
        {"role": role, "content": text(said, f"history[{i}][{j}]", may_be_empty=True)}
        for i, turn in enumerate(turns)
        for j, (role, said) in enumerate(zip(("user", "assistant"), turn, strict=True))
    ]


def _assistant(content: str) -> list[Message]:
    return [{"role": "assistant", "content": content}]


# ---------------------------------------------------------------------------------------------------------- plain text
def _split_text(chosen: str, rejected: str, keys: Keys) -> Preference:
    """Splits off the common beginning as the prompt, up to the space before the first word that differs."""
    last = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1  # a response has one character at least
    cut = _common_prefix_length(chosen, rejected, at_most=last)
    if last >= 0 and not (chosen[cut].isspace() and rejected[cut].isspace()):
        while cut and not chosen[cut - 1].isspace():
            cut -= 1
    while cut > 0 and chosen[cut - 1].isspace():
        cut -= 1
    if cut <= 0:
        raise RowProblem(
            f"{keys.chosen} and {keys.rejected} have no first word in common, so they hold no prompt; where the prompt "
            "is a column of its own, name it in data.prompt_key"
        )
    return Preference(chosen[:cut], chosen[cut:], rejected[cut:])


def _common_prefix_length(a: str, b: str, *, at_most: int) -> int:
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
