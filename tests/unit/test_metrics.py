"""Values of all ranks become one number by their declared reduction, in one exchange."""

from __future__ import annotations

import math

import pytest
import torch

from megadpo.losses import STATISTICS, SUMS
from megadpo.metrics import Metric, Reduction, add_sums, preference_means, reduce_metrics

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
    assert reduce_metrics(metrics, gather=gather, device=CPU) == {"tokens": 111.0, "time": 7.0, "below zero": -2.0}
    (row_K,) = gather.calls
    assert row_K.dtype is torch.float64


def test_values_keep_their_fp64_digits() -> None:
    value = 4000.0 + 1e-9
    metrics = {"a": Metric(value, Reduction.SUM), "b": Metric(torch.tensor(value, dtype=torch.float64), Reduction.SUM)}
    assert reduce_metrics(metrics, gather=OtherRanks([0.0, 0.0]), device=CPU) == {"a": value, "b": value}


@pytest.mark.parametrize("reduction", list(Reduction))
def test_one_rank_that_is_not_finite_shows(reduction: Reduction) -> None:
    reduced = reduce_metrics({"loss": Metric(1.0, reduction)}, gather=OtherRanks([math.nan], [2.0]), device=CPU)
    assert math.isnan(reduced["loss"])


def test_nothing_to_reduce_asks_nobody() -> None:
    gather = OtherRanks()
    assert reduce_metrics({}, gather=gather, device=CPU) == {}
    assert gather.calls == []


def test_means_are_over_pairs_and_over_the_tokens_that_were_counted() -> None:
    sums = dict.fromkeys(SUMS, 0.0) | {"loss": 6.0, "rewards/margins": -3.0, "pairs": 4.0}
    means = dict.fromkeys(STATISTICS, 0.0) | {"loss": 1.5, "rewards/margins": -0.75, "pairs": 4.0}
    assert preference_means(sums) == means
    tokens = {"entropy": 30.0, "response_tokens": 20.0, "mean_token_accuracy": 3.0, "chosen_tokens": 12.0}
    assert preference_means(sums | tokens) == means | {"entropy": 1.5, "mean_token_accuracy": 0.25}


def test_adding_sums_leaves_the_addends_alone() -> None:
    total: dict[str, torch.Tensor] = {}
    first = {"loss": torch.tensor(1.0), "pairs": torch.tensor(2.0)}
    second = {"loss": torch.tensor(10.0), "logps/chosen": torch.tensor(-5.0)}
    add_sums(total, first)
    add_sums(total, second)
    assert total == {"loss": 11.0, "pairs": 2.0, "logps/chosen": -5.0}
    assert first == {"loss": 1.0, "pairs": 2.0}
    assert second == {"loss": 10.0, "logps/chosen": -5.0}
