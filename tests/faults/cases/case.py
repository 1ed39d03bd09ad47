"""A row of the table of bad input: how the input is made from a good base, and the message that it must get.

In words and messages `HERE` stands for the case's own directory, `MODEL` for a good model, `PAIRS` for good pairs;
messages are regular expressions of how the error begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PAIR = {"prompt": "Name a stone.", "chosen": " Granite.", "rejected": " A river."}
CHAT_PAIR = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a stone."}],
    "chosen": [{"role": "assistant", "content": "Granite."}],
    "rejected": [{"role": "assistant", "content": "A river."}],
}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Base:
    """The good inputs that cases are made from: a model in one file, the same in several, and pairs."""

    model: Path
    sharded: Path
    pairs: Path


@dataclass(frozen=True)
class Case:
    """`make` writes the input into an empty directory; the last words win over the base's."""

    name: str
    words: tuple[str, ...]
    message: str
    make: Callable[[Path, Base], None] = lambda here, base: None
    reads_weights: bool = False
    """found in the values of the weights, and so only while they are read"""
    skippable: bool = False
    """one row of HERE/pairs.* is bad, which data.on_error=skip leaves out"""


def row(**columns: object) -> str:
    """A good row as a line of JSON, with these columns changed or added."""
    return json.dumps({**PAIR, **columns}) + "\n"


def file_case(name: str, content: str | bytes, message: str, *words: str, file: str = "pairs.jsonl") -> Case:
    """Training pairs in a file of their own."""
    return Case(name, (f"data.train_path=HERE/{file}", *words), message, lambda here, _: write(file, content)(here))


def row_case(
    name: str, bad: str | bytes, message: str, *, file: str = "pairs.jsonl", good: str = row() + row(prompt="Another.")
) -> Case:
    """A bad row behind good ones, on line 3; the error says that such rows can be skipped."""
    content = good.encode() + (bad.encode() if isinstance(bad, str) else bad)
    message = rf"HERE/{file}:3: {message}.*; data\.on_error=skip leaves such rows out and counts them$"
    return replace(file_case(name, content, message, file=file), skippable=True)


def model_case(
    name: str,
    change: Change,
    message: str,
    *words: str,
    pairs: str = "",
    sharded: bool = False,
    reads_weights: bool = False,
) -> Case:
    """A copy of the good model with one change; `pairs`: what HERE/pairs.jsonl holds, to train on instead."""

    def make(here: Path, base: Base) -> None:
        (here / "model").mkdir()
        for path in (base.sharded if sharded else base.model).iterdir():
            os.link(path, here / "model" / path.name)
        change(here / "model")
        if pairs:
            (here / "pairs.jsonl").write_text(pairs, encoding="utf-8")

    own_pairs = ("data.train_path=HERE/pairs.jsonl",) if pairs else ()
    return Case(name, ("model.hf_path=HERE/model", *own_pairs, *words), message, make, reads_weights)


# ------------------------------------------------------------------------------------- changes of a directory of links
def write(file: str, content: str | bytes) -> Change:
    """Gives a file another content."""

    def change(directory: Path) -> None:
        (directory / file).unlink(missing_ok=True)  # the name of this copy; the good one keeps its content
        (directory / file).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    return change


def remove(*files: str) -> Change:
    """Takes files away."""

    def change(directory: Path) -> None:
        for file in files:
            (directory / file).unlink()

    return change


def rename(file: str, to: str) -> Change:
    """Gives a file another name."""

    def change(directory: Path) -> None:
        (directory / file).rename(directory / to)

    return change


def edit_json(file: str, edit: Callable[[Any], Any]) -> Change:
    """Replaces a JSON file by what `edit` returns for its content."""

    def change(directory: Path) -> None:
        write(file, json.dumps(edit(json.loads((directory / file).read_text(encoding="utf-8")))))(directory)

    return change


def config(**fields: Any) -> Change:
    """Sets fields of config.json."""
    return edit_json("config.json", lambda content: content | fields)


def tokenizer_config(**fields: Any) -> Change:
    """Sets fields of tokenizer_config.json."""
    return edit_json("tokenizer_config.json", lambda content: content | fields)


def weights(edit: Callable[[dict[str, torch.Tensor]], Any], file: str = SINGLE_FILE) -> Change:
    """Changes the tensors of a file in place, by name."""

    def change(directory: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(directory / file).items()}
        edit(tensors)
        (directory / file).unlink()
        save_file(tensors, directory / file, metadata={"format": "pt"})

    return change
