"""Values of all ranks become one number by their declared reduction, in one exchange."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megadpo.loss.preference import LENGTHS, STATISTICS, SUMS
from megadpo.metrics.reduction import Metric, Reduction, add_sums, preference_means, reduce_metrics

CPU = torch.device("cpu")


class OtherRanks:
    """Stands for the gather over a world whose other ranks hold the given rows; remembers what it was asked."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = [torch.tensor(row, dtype=torch.float64) for row in rows]
        self.calls: list[torch.Tensor] = []

    def __call__(self, row_K: torch.Tensor) -> torch.Tensor:
        self.calls.append(row_K)
        return torch.stack([row_K, *self.rows])


def test_sums_and_maxima_share_one_gather() -> None:
    gather = OtherRanks([10.0, 7.0, -3.0], [100.0, 5.0, -4.0])
    metrics = {
        "tokens": Metric(1.0, Reduction.SUM),
        "time": Metric(6.5, Reduction.MAX),
        "below zero": Metric(torch.tensor(-2.0), Reduction.MAX),
    }
    assert reduce_metrics(metrics, gather=gather, torch_device=CPU) == {
        "tokens": 111.0,
        "time": 7.0,
        "below zero": -2.0,
    }
    (row_K,) = gather.calls
    assert row_K.dtype is torch.float64


def test_values_keep_their_fp64_digits() -> None:
    value = 4000.0 + 1e-9
    metrics = {"a": Metric(value, Reduction.SUM), "b": Metric(torch.tensor(value, dtype=torch.float64), Reduction.SUM)}
    assert reduce_metrics(metrics, gather=OtherRanks([0.0, 0.0]), torch_device=CPU) == {"a": value, "b": value}


@pytest.mark.parametrize("reduction", list(Reduction))
def test_one_rank_that_is_not_finite_shows(reduction: Reduction) -> None:
    reduced = reduce_metrics({"loss": Metric(1.0, reduction)}, gather=OtherRanks([math.nan], [2.0]), torch_device=CPU)
    assert math.isnan(reduced["loss"])


def test_nothing_to_reduce_asks_nobody() -> None:
    gather = OtherRanks()
    assert reduce_metrics({}, gather=gather, torch_device=CPU) == {}
    assert gather.calls == []


def test_means_are_over_pairs_and_over_the_tokens_that_were_counted() -> None:
    sums = dict.fromkeys(SUMS, 0.0) | {"loss": 6.0, "rewards/margins": -3.0, "pairs": 4.0}
    means = dict.fromkeys((*STATISTICS, *LENGTHS), 0.0) | {"loss": 1.5, "rewards/margins": -0.75, "pairs": 4.0}
    assert preference_means(sums) == means
    tokens = {"entropy": 30.0, "response_tokens": 20.0, "mean_token_accuracy": 3.0, "chosen_tokens": 12.0}
    assert preference_means(sums | tokens) == means | {"entropy": 1.5, "mean_token_accuracy": 0.25}


def length_sums(gaps: list[float], margins: list[float]) -> dict[str, float]:
    """The sums that a correlation is made of; rejected responses have 100 tokens."""
    products = {"gap_x_gap": (gaps, gaps), "gap_x_margin": (gaps, margins), "margin_x_margin": (margins, margins)}
    sums = {name: sum(a * b for a, b in zip(*both, strict=True)) for name, both in products.items()}
    lengths = {"lengths/chosen": sum(gap + 100 for gap in gaps), "lengths/rejected": 100.0 * len(gaps)}
    return dict.fromkeys(SUMS, 0.0) | sums | lengths | {"rewards/margins": sum(margins), "pairs": float(len(gaps))}


GAPS, MARGINS = [5.0, -30.0, 12.0, 0.0, 44.0], [0.5, -1.0, 2.0, 0.1, 0.7]


def test_length_correlation_is_pearson_s() -> None:
    means = preference_means(length_sums(GAPS, MARGINS))
    assert means["rewards/length_correlation"] == pytest.approx(float(np.corrcoef(GAPS, MARGINS)[0, 1]), rel=1e-12)
    assert (means["lengths/chosen"], means["lengths/rejected"]) == (pytest.approx(106.2), 100.0)
    line = [0.001 * gap - 3 for gap in GAPS]
    assert preference_means(length_sums(GAPS, line))["rewards/length_correlation"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("gaps", "margins"),
    [(GAPS, [0.0] * 5), (GAPS, [0.1] * 5), ([7.0] * 5, MARGINS), ([3.0], [0.5]), (GAPS, [math.nan] * 5)],
    ids=["first step", "constant margin", "constant gap", "one pair", "NaN"],
)
def test_what_does_not_vary_has_no_correlation(gaps: list[float], margins: list[float]) -> None:
    assert "rewards/length_correlation" not in preference_means(length_sums(gaps, margins))


def test_margins_of_rounding_size_have_no_correlation() -> None:
    """Before the first update policy and reference differ by the rounding of their log-probs, which goes by length."""
    logps = {"logps/chosen": -300.0 * 5, "logps/rejected": -320.0 * 5}
    found = {
        size: "rewards/length_correlation" in preference_means(length_sums(GAPS, [size * m for m in MARGINS]) | logps)
        for size in (3e-6, 1e-4)
    }
    assert found == {3e-6: False, 1e-4: True}


def test_adding_sums_leaves_the_addends_alone() -> None:
    total: dict[str, torch.Tensor] = {}
    first = {"loss": torch.tensor(1.0), "pairs": torch.tensor(2.0)}
    second = {"loss": torch.tensor(10.0), "logps/chosen": torch.tensor(-5.0)}
    add_sums(total, first)
    add_sums(total, second)
    assert total == {"loss": 11.0, "pairs": 2.0, "logps/chosen": -5.0}
    assert first == {"loss": 1.0, "pairs": 2.0}
    assert second == {"loss": 10.0, "logps/chosen": -5.0}


def test_without_pairs_there_are_no_means() -> None:
    """As where every update of a line was skipped."""
    assert preference_means(dict.fromkeys(SUMS, 0.0)) == {"pairs": 0.0}
