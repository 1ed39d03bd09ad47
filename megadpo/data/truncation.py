"""Truncation of pairs to the length limit: a pure function of their lengths.

Legend: n pairs; a pair has a prompt that both responses share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int32]


class Outcome(IntEnum):
    """The result of truncating a pair: kept, or the reason why it is dropped."""

    KEPT = 0
    LONG_PROMPT = 1
    """dropped: the prompt alone reaches the limit"""
    LONG_RESPONSE = 2
    """dropped: a response alone reaches the limit"""
    TOO_LONG = 3
    """dropped: prompt and response together exceed the limit, and nothing is cut"""
    EMPTY_RESPONSE = 4
    """dropped: nothing of a response is there to score"""


@dataclass(frozen=True, slots=True)
class Cut:
    """Outcomes of n pairs, the numbers of tokens cut from the prompts' beginning, and those kept of the responses."""

    outcome_n: npt.NDArray[np.uint8]
    prompt_skip_n: Lengths
    chosen_n: Lengths
    rejected_n: Lengths


def cut_to_length(prompt_n: Lengths, chosen_n: Lengths, rejected_n: Lengths, *, max_length: int, mode: str) -> Cut:
    """Truncates pairs with these numbers of tokens so that prompt + response has at most `max_length`.

    `mode`: `keep_start` cuts responses at the end, and drops pairs whose prompt alone reaches the limit; `keep_end`
    cuts the beginning of the prompt by as much as the longer response needs, and drops pairs in which no prompt would
    be left; `drop` and `error` cut nothing and mark longer pairs as TOO_LONG. Lengths of dropped pairs mean nothing.
    """
    cut = _MODES[mode](prompt_n, chosen_n, rejected_n, max_length)
    empty_n = (cut.outcome_n == Outcome.KEPT) & (np.minimum(chosen_n, rejected_n) == 0)
    cut.outcome_n[empty_n] = Outcome.EMPTY_RESPONSE
    return cut


def _keep_start(prompt_n: Lengths, chosen_n: Lengths, rejected_n: Lengths, max_length: int) -> Cut:
    room_n = max_length - prompt_n
    return Cut(
        outcome_n=np.where(room_n <= 0, Outcome.LONG_PROMPT, Outcome.KEPT).astype(np.uint8),
        prompt_skip_n=np.zeros_like(prompt_n),
        chosen_n=np.minimum(chosen_n, room_n),
        rejected_n=np.minimum(rejected_n, room_n),
    )


def _keep_end(prompt_n: Lengths, chosen_n: Lengths, rejected_n: Lengths, max_length: int) -> Cut:
    skip_n = np.maximum(0, prompt_n + np.maximum(chosen_n, rejected_n) - max_length)
    # One token must stay, whose row predicts a response's first token.
    return Cut(
        outcome_n=np.where(skip_n >= prompt_n, Outcome.LONG_RESPONSE, Outcome.KEPT).astype(np.uint8),
        prompt_skip_n=skip_n,
        chosen_n=chosen_n.copy(),
        rejected_n=rejected_n.copy(),
    )


def _drop(prompt_n: Lengths, chosen_n: Lengths, rejected_n: Lengths, max_length: int) -> Cut:
    longest_n = prompt_n + np.maximum(chosen_n, rejected_n)
    return Cut(
        outcome_n=np.where(longest_n > max_length, Outcome.TOO_LONG, Outcome.KEPT).astype(np.uint8),
        prompt_skip_n=np.zeros_like(prompt_n),
        chosen_n=chosen_n.copy(),
        rejected_n=rejected_n.copy(),
    )


_MODES: dict[str, Callable[[Lengths, Lengths, Lengths, int], Cut]] = {
    "keep_start": _keep_start,
    "keep_end": _keep_end,
    "drop": _drop,
    "error": _drop,
}
