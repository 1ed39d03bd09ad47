"""Preference pairs of widely varying lengths, made from a seed, and the pairs that files hold, all in memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadpo.data.dataset import RawPair, iter_rows, parse_row
from megadpo.data.layouts import Keys

_NOUNS = "river stone lamp garden engine window teacher valley copper signal harbour pencil".split()
_VERBS = "finds keeps moves paints breaks carries opens counts".split()
_ADJECTIVES = "quiet bright heavy rapid gentle narrow early silver".split()


def make_pairs(n: int, seed: int, *, conversational: bool = False) -> list[dict[str, Any]]:
    """`n` pairs as records of a JSONL file; plain text, or lists of messages with some prompts of several turns.

    Prompts have 1 to 6 sentences and responses 1 word to 5 sentences. Every eighth pair has a response of 20 sentences
    and every twelfth a prompt of 20: with a `max_length` of 256 tokens, the first are cut and the second dropped.
    """
    rng = random.Random(seed)
    pairs = []
    for index in range(n):
        prompt = _text(rng, 20 if index % 12 == 5 else rng.randint(1, 6)) + " What then?"
        chosen = _text(rng, 20 if index % 8 == 3 else rng.randint(1, 5))
        rejected = rng.choice(_NOUNS) if rng.random() < 0.3 else _text(rng, rng.randint(1, 5))
        if index % 3 == 1:
            chosen, rejected = rejected, chosen
        if conversational:
            pairs.append(_as_messages(prompt, chosen, rejected, several_turns=rng.random() < 0.4))
        else:
            pairs.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    return pairs


def read_pairs(paths: str | Path | Sequence[str | Path], **names: str) -> list[RawPair]:
    """All pairs of the concatenated sources; `names` are those of `Keys`. Raises DataError at the first bad row."""
    sources = [paths] if isinstance(paths, str | Path) else paths
    keys = Keys(**names)
    return [parse_row(row, keys) for row in iter_rows([str(path) for path in sources], keys)]


def _text(rng: random.Random, sentences: int) -> str:
    """So many short sentences."""
    return " ".join(
        f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} {rng.choice(_VERBS)} {rng.randint(0, 99)}."
        for _ in range(sentences)
    )


def _as_messages(prompt: str, chosen: str, rejected: str, *, several_turns: bool) -> dict[str, Any]:
    """A record whose prompt is a conversation and whose responses are one assistant message each."""
    earlier = [{"role": "user", "content": "Good day."}, {"role": "assistant", "content": "Good day to you."}]
    return {
        "prompt": [*(earlier if several_turns else []), {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
