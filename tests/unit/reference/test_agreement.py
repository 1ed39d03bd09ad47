"""Log-probs computed twice: rounding is told from other weights, and the worst row is named."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megadpo.config.choices import Dtype, Fp8Recipe
from megadpo.config.schema import PrecisionConfig
from megadpo.reference.agreement import compare, noise_bounds


def usual(precision: PrecisionConfig, tokens: int, per_token: float, *, biased: bool = False) -> bool:
    """Whether log-probs of so long responses are as far apart as is usual, each token being off by so much."""
    draw = np.random.default_rng(0)
    pairs: Any = [SimpleNamespace(chosen=range(tokens), rejected=range(tokens), index=i) for i in range(8)]
    one = draw.normal(-4.0 * tokens, 10.0, (8, 4))
    off = per_token * tokens if biased else draw.normal(0.0, per_token, (8, 4, tokens)).sum(axis=2)
    return (
        compare(pairs, one, one + off).noise <= noise_bounds(str(precision.dtype), fp8=precision.fp8 is not None).usual
    )


@pytest.mark.parametrize("tokens", [20, 400])
def test_rounding_is_told_from_other_weights(tokens: int) -> None:
    """Errors of tokens add up like a random walk; a short training moves a response's tokens by hundredths of nats."""
    fp32, bf16 = PrecisionConfig(dtype=Dtype.fp32), PrecisionConfig()
    fp8 = PrecisionConfig(fp8=Fp8Recipe.blockwise)
    assert usual(fp32, tokens, 2e-5) and usual(bf16, tokens, 0.03) and usual(fp8, tokens, 0.06)
    assert not usual(fp32, tokens, 1e-3) and not usual(bf16, tokens, 0.1) and not usual(fp8, tokens, 0.2)
    assert not usual(bf16, tokens, 0.02, biased=True) and not usual(fp32, tokens, 1e-4, biased=True)


def test_the_worst_row_is_told() -> None:
    pairs: Any = [SimpleNamespace(chosen=range(4), rejected=range(16), index=10 * i) for i in range(3)]
    kept = np.full((3, 4), -100.0)
    off = np.array([[0, 0, 9, 9], [0.2, -0.2, 9, 9], [0.0, 0.3, 9, 9]], np.float64)
    found = compare(pairs, kept, kept + off)
    assert (found.row, found.kept, found.computed) == (10, [-100.0, -100.0], [-99.8, -100.2])
    assert found.noise == pytest.approx(math.sqrt((0.1**2 + 0.05**2 + 0.075**2) / 6))
