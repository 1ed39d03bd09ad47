"""Input that is odd and accepted, or skipped: two runs that go to their end, and what they must count."""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.cases.case import PAIR, Base, Case, model_case, row, tokenizer_config, write

_ROWS = row() + row(prompt="Name a \N{GEM STONE}.")
_TABLE = [
    "prompt,chosen,rejected",
    *(f'"Name a {what}."," Granite."," A river."' for what in ("stone", "\N{GEM STONE}")),
]

SAME_ROWS: dict[str, tuple[str, str | bytes]] = {
    "plain": ("plain.jsonl", _ROWS),
    "bom": ("bom.jsonl", "\ufeff" + _ROWS),
    "crlf": ("crlf.jsonl", _ROWS.replace("\n", "\r\n")),
    "blank_lines": ("blank.jsonl", "\n" + _ROWS.replace("\n", "\n \n")),
    "no_last_newline": ("end.jsonl", _ROWS.rstrip()),
    "array": ("array.json", "\ufeff" + json.dumps([json.loads(line) for line in _ROWS.splitlines()], indent=1)),
    "table": ("table.csv", "\ufeff" + "\r\n".join(_TABLE)),
}
"""the same two pairs in different dress: file and content"""

OTHER_ROWS: dict[str, tuple[str, dict[str, int]]] = {
    "long_line": (row(chosen=" stone" * 175_000), {"read": 1, "kept": 1, "truncated_chosen": 1}),  # 1 MB
    "equal_responses": (row(rejected=PAIR["chosen"]), {"read": 1, "kept": 1, "equal_responses": 1}),
    "repeated": (row() * 3, {"read": 3, "kept": 3, "duplicate": 2}),
    "long_prompt": (row() + row(prompt="A stone. " * 40), {"read": 2, "kept": 1, "dropped_long_prompt": 1}),
}
"""content of a file, and all its counts that are not 0"""


def _write_sets(here: Path) -> None:
    for file, content in [*SAME_ROWS.values(), *((f"{name}.jsonl", rows) for name, (rows, _) in OTHER_ROWS.items())]:
        write(file, content)(here)


def _accepted() -> Case:
    """One pair on two ranks, every set for validation, and a pad token that the model does not have."""
    files = {name: file for name, (file, _) in SAME_ROWS.items()} | {name: f"{name}.jsonl" for name in OTHER_ROWS}
    sets = ", ".join(f"{name}: HERE/{file}" for name, file in files.items())
    words = (f"data.validation_path={{{sets}}}", "data.max_length=64")
    model = model_case("accepted", tokenizer_config(pad_token="<padding>"), "", *words, pairs=row())

    def make(here: Path, base: Base) -> None:
        model.make(here, base)
        _write_sets(here)

    return Case(model.name, model.words, "", make)


def skipping(files: list[str], run_dir: str) -> Case:
    """Files with one bad row each, in a directory that a refused start left; and a tokenizer without a pad token."""
    words = (f"data.train_path=[{','.join(files)}]", "data.on_error=skip", f"train.run_dir={run_dir}")
    return model_case("skipping", tokenizer_config(pad_token=None), "", *words)


ACCEPTED = _accepted()
