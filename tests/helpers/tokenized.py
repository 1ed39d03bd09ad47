"""Tokenized pairs of a file, the way a run gets them."""

from __future__ import annotations

import tempfile
from datetime import date
from pathlib import Path

import numpy as np

from megadpo.data.layouts import Keys
from megadpo.data.prepare import Recipe, open_store, prepare_store
from megadpo.data.store import select_pairs
from megadpo.data.tokenization import TokenizedPair

KEYS = Keys("prompt", "chosen", "rejected")


def recipe(tokenizer_dir: Path | str, *, skip_bad_rows: bool = False, keys: Keys = KEYS) -> Recipe:
    """A recipe for one tokenizer; the date is fixed."""
    return Recipe(keys, Path(tokenizer_dir), date(2025, 1, 31), skip_bad_rows)


def tokenized_pairs(path: Path | str, tokenizer_dir: Path | str, *, max_length: int = 2**30) -> list[TokenizedPair]:
    """The pairs that a run keeps of a file, in memory."""
    with tempfile.TemporaryDirectory() as cache:
        prepared = prepare_store(
            [str(path)], recipe(tokenizer_dir), cache_dir=Path(cache), workers=1, report=lambda share, rows: None
        )
        store = open_store(prepared)
        view = select_pairs(
            store, np.arange(len(store)), max_length=max_length, truncation="keep_start", title="test pairs"
        )
        return [TokenizedPair(p.index, p.prompt.copy(), p.chosen.copy(), p.rejected.copy(), p.where) for p in view]
