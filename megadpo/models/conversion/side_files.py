"""Files that accompany the weights: configuration, tokenizer, chat templates, generation defaults."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megadpo.errors import ConversionError
from megadpo.runtime.files import writing

_CONFIG = "config.json"
_NAMES = (
    _CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATE_DIR = "additional_chat_templates"
_DTYPE_FIELDS = ("dtype", "torch_dtype")

SideFiles = Mapping[str, bytes]
"""Contents by name; a file of a folder is FOLDER/NAME."""


def read_side_files(directory: Path) -> SideFiles:
    """Reads the side files in `directory`. Raises ConversionError without a config.json; the others are optional.

    They are kept in memory, in case the source is removed during a run; the largest, tokenizer.json, has some 20 MB.
    """
    if not (directory / _CONFIG).is_file():
        raise ConversionError(f"{directory / _CONFIG} does not exist; name the directory that the model came from")
    names = [*_NAMES, *(f"{_TEMPLATE_DIR}/{path.name}" for path in sorted((directory / _TEMPLATE_DIR).glob("*")))]
    try:
        return {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    except OSError as error:
        raise ConversionError(
            f"{error.filename or directory} can't be read ({error.strerror}): check it, or name another directory"
        ) from error


def write_side_files(files: SideFiles, directory: Path, *, dtype: torch.dtype) -> None:
    """Creates `directory` and writes side files into it, byte for byte; for one rank.

    One exception: if `config.json` names another dtype than `dtype`, that of the weights beside it, only the value of
    that field is changed. Raises ConversionError if they can't be written.
    """
    with writing(directory, ConversionError):
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content if name != _CONFIG else _with_dtype(content, dtype))


def different_side_files(theirs: SideFiles, ours: SideFiles) -> dict[str, str]:
    """Compares a checkpoint's side files (`ours`) with those of its Hugging Face directory; {name: difference}.

    Files are compared byte for byte, except config.json: by the values of its fields, without the dtype, which
    conversions change. Both configurations must be JSON objects.
    """
    different = {}
    for name in sorted({*theirs, *ours}):
        if name not in theirs or name not in ours:
            different[name] = f"{'only' if name in ours else 'not'} in the checkpoint"
        elif name == _CONFIG:
            fields = _different_fields(json.loads(theirs[name]), json.loads(ours[name]))
            if fields:
                different[name] = f"fields differ: {', '.join(fields)}"
        elif theirs[name] != ours[name]:
            different[name] = f"contents differ ({len(theirs[name])} and {len(ours[name])} bytes)"
    return different


def _different_fields(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    # Compared as text, since in Python 1 == True.
    before, after = ({name: json.dumps(value, sort_keys=True) for name, value in f.items()} for f in (theirs, ours))
    names = sorted({*before, *after} - {*_DTYPE_FIELDS})
    return [name for name in names if before.get(name) != after.get(name)]


def _with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """Returns the JSON text with the value of its `dtype` (older: `torch_dtype`) field replaced, else unchanged."""
    fields, name = json.loads(config), str(dtype).removeprefix("torch.")
    for key in _DTYPE_FIELDS:
        if fields.get(key) not in (None, name):
            pattern = rb'("' + key.encode() + rb'"\s*:\s*)' + re.escape(json.dumps(fields[key]).encode())
            config = re.sub(pattern, rb'\g<1>"' + name.encode() + rb'"', config)
    return config
