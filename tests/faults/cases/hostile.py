"""Models that somebody made to do harm: sizes, headers, programs and templates, refused by name in no time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.faults.cases.case import (
    CHAT_PAIR,
    SINGLE_FILE,
    Change,
    config,
    edit_json,
    model_case,
    tokenizer_config,
    write,
)

_CONFIG = r"HERE/model/config\.json: \d not supported:\n"
_FILE = r"HERE/model/model\.safetensors cannot be read: "
_CHAT = json.dumps(CHAT_PAIR) + "\n"
# One tensor of a header, behind eight bytes of data.
_ENTRY = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


def _nested(depth: int) -> Any:
    return {"0": _nested(depth - 1)} if depth else 0


def _pipe(file: str) -> Change:
    """Puts a pipe in a file's place, which whoever opens it waits for."""

    def change(directory: Path) -> None:
        (directory / file).unlink()
        os.mkfifo(directory / file)

    return change


def _header(old: str = "", new: str = "", second: str = "") -> Change:
    """Gives the weights a header of one tensor with `old` replaced by `new`, or of two."""
    text = "{" + f'"a": {_ENTRY}{second}'.replace(old, new) + "}"
    return write(SINGLE_FILE, len(text).to_bytes(8, "little") + text.encode() + bytes(8))


_SIZES = [
    model_case(f"{name} beyond all models", config(**{name: size}), _CONFIG + f"  {name} = 1.* must be at most {most}")
    for name, size, most in (
        ("num_hidden_layers", 10**18, 10_000),
        ("vocab_size", 10**15, 2**28),
        ("hidden_size", 1e18, 2**28),
        ("head_dim", 10**9, 2**16),
        ("num_labels", 10**7, 100_000),
    )
]
_CONFIGURATION = [
    model_case(
        "heads beyond all models",
        config(hidden_size=2**20, num_attention_heads=1, num_key_value_heads=1, head_dim=None),
        _CONFIG + "  hidden_size / num_attention_heads = 1048576 must be at most 65536",
    ),
    model_case(
        "config.json whose values nest too deeply",
        edit_json("config.json", lambda content: content | {"id2label": _nested(900)}),
        r"HERE/model/config\.json is nested too deeply; download it again",
    ),
    model_case("dtype that is none", config(dtype=[1]), _CONFIG + "  transformers refuses it: "),
    model_case("program of a model", config(auto_map={"AutoConfig": "evil.C"}), _CONFIG + "  auto_map = .* not under"),
    model_case(
        "program of a tokenizer",
        tokenizer_config(auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]}, tokenizer_class="Tokenizer"),
        r"the tokenizer in HERE/model needs a program of its own \(auto_map .*\), and programs of models are not run: ",
    ),
]

_HEADERS = [
    model_case(f"header with {what}", change, _FILE + message)
    for what, change, message in (
        ("data behind the end", _header("8]", "80]"), "it has .* so the download was cut off"),
        ("data before the start", _header("[0", "[-8"), ".*download or export it again"),
        ("a shape of another size", _header("[2]", "[3]"), ".*download or export it again"),
        ("a shape that overflows", _header("[2]", f"[{2**63 + 1}, 2]"), ".*overflow"),
        ("tensors that overlap", _header(second=f', "b": {_ENTRY}'), ".*invalid offset"),
        ("a name twice", _header(second=', "a": ' + _ENTRY.replace("[0", "[4")), ".*download or export it again"),
    )
]
_FILES = [
    model_case(
        "header of 2**60 bytes",
        write(SINGLE_FILE, (2**60).to_bytes(8, "little") + b"{}"),
        _FILE + "none of its 10 bytes make a safetensors header; download or export it again",
    ),
    model_case(
        "tensor of a million axes",
        _header("[2]", "[2" + ", 1" * 1_000_000 + "]"),
        r"HERE/model/model\.safetensors: a has 1000001 axes, at most 8 are read: download it again$",
    ),
    model_case(
        "pipe in a shard's place",
        _pipe("model-00001-of-00004.safetensors"),
        r"HERE/model/model-00001-of-00004\.safetensors is not a file; download it again$",
        sharded=True,
    ),
]

# What transformers' sandbox refuses. It does not bound the time of nested loops, nor memory that there is.
_TEMPLATES = [
    model_case(
        f"template that {what}",
        write("chat_template.jinja", template),
        rf"HERE/pairs\.jsonl:1: the chat template refuses the conversation: .*{message}",
        pairs=_CHAT,
    )
    for what, template, message in (
        ("looks for classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__.* is unsafe"),
        ("looks for modules", "{{ cycler.__init__.__globals__.os.mkdir('x') }}", "__init__.* is unsafe"),
        ("formats attributes", "{{ '{0.__class__.__mro__}'.format('') }}", "__class__.* is unsafe"),
        ("changes the row", "{{ messages.append(1) }}", "append.* is unsafe"),
        ("reads a file", "{% include '/etc/passwd' %}", "no loader for this environment"),
        ("counts to a billion", "{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("takes all memory", "{{ 'x' * 10**15 }}", "MemoryError"),
        ("calls itself", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    )
]

CASES = [*_SIZES, *_CONFIGURATION, *_HEADERS, *_FILES, *_TEMPLATES]
