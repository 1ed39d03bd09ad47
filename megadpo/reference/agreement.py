"""Whether two computations of pairs' log-probs differ by rounding only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megadpo.config.choices import Dtype
from megadpo.config.schema import PrecisionConfig
from megadpo.data.tokenization import TokenizedPair
from megadpo.reference.store import LogProbs

# What rounding may do to a token's log-prob, in nats. Errors of tokens are independent of each other, so that the sum
# over a response of L tokens is off by sqrt(L) of it; other weights move the tokens of a response in one direction.
_NOISE = {Dtype.fp32: 1e-4, Dtype.bf16: 0.05}
_NOISE_IN_FP8 = 0.1


def noise_allowed(precision: PrecisionConfig) -> float:
    """What rounding may do to a token's log-prob, in nats: layouts and packings, not weights, differ by less."""
    return _NOISE[precision.dtype] if precision.fp8 is None else _NOISE_IN_FP8


def noise_between(pairs: Sequence[TokenizedPair], one_n4: LogProbs, other_n4: LogProbs) -> float:
    """Root mean square over the pairs' responses of their log-probs' difference over the root of their length, nats."""
    lengths_n2 = np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs], np.float64)
    off_n2 = (one_n4 - other_n4)[:, :2] / np.sqrt(lengths_n2)
    return math.sqrt(np.square(off_n2).mean())
