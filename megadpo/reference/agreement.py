"""Judges whether two computations of pairs' log-probs agree up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megadpo.data.tokenization import TokenizedPair
from megadpo.reference.store import LogProbs


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits in nats per root of a token: `usual` for rounding within one layout, `possible` for any rounding."""

    usual: float
    possible: float


# Rounding errors of tokens are independent, so the sum over a response of L tokens is off by sqrt(L) times one token's;
# other weights move all tokens of a response in one direction. Errors grow with the logits: sixteen random layers whose
# logits have a standard deviation of 6 differ between tensor=2 and one rank by 0.16 in bf16 and 0.65 in emulated mxfp8,
# a small model with flat logits by 0.004 and 0.02. Other models are off by some nats.
_BOUNDS = {"fp32": Bounds(1e-4, 1e-2), "bf16": Bounds(0.05, 0.5)}
_IN_FP8 = Bounds(0.1, 1.0)


def noise_bounds(dtype: str, *, fp8: bool) -> Bounds:
    """Bounds on the difference of log-probs of the same weights in this precision."""
    return _IN_FP8 if fp8 else _BOUNDS[dtype]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The difference of two computations (`noise`, in nats per root of a token), and the row where it is largest."""

    noise: float
    row: int
    kept: list[float]
    computed: list[float]


def compare(pairs: Sequence[TokenizedPair], kept_n4: LogProbs, computed_n4: LogProbs) -> Disagreement:
    """Compares two computations: root mean square, over all responses, of difference / sqrt(response length)."""
    lengths_n2 = np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs], np.float64)
    off_n2 = (computed_n4 - kept_n4)[:, :2] / np.sqrt(lengths_n2)
    worst = int(np.abs(off_n2).max(axis=1).argmax())
    return Disagreement(
        noise=float(np.sqrt(np.square(off_n2).mean())),
        row=pairs[worst].index,
        kept=kept_n4[worst, :2].tolist(),
        computed=computed_n4[worst, :2].tolist(),
    )
