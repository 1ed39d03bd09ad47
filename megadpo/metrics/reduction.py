"""Values to log, each with the reduction that combines all ranks' contributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from megadpo.loss.preference import LENGTHS, STATISTICS, TOKEN_STATISTICS


class Reduction(Enum):
    """The operation that combines the contributions of all ranks into one number."""

    SUM = "sum"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Metric:
    """One rank's contribution to a logged number; all ranks must have the same metrics (0 where one has no value)."""

    value: float | torch.Tensor
    reduction: Reduction


def reduce_metrics(
    metrics: Mapping[str, Metric], *, gather: Callable[[torch.Tensor], torch.Tensor], torch_device: torch.device
) -> dict[str, float]:
    """Returns all metrics reduced, on every rank, with one `gather` ([K] → [world, K], fp64) for all of them."""
    if not metrics:
        return {}
    on_host = [0.0 if isinstance(m.value, torch.Tensor) else m.value for m in metrics.values()]
    row_K = torch.tensor(on_host, dtype=torch.float64).to(torch_device)  # one copy for all
    for column, metric in enumerate(metrics.values()):
        if isinstance(metric.value, torch.Tensor):
            row_K[column] = metric.value
    rows = gather(row_K).cpu()
    reduced = {}
    for column, (name, metric) in enumerate(metrics.items()):
        values = rows[:, column]
        reduced[name] = float(values.sum() if metric.reduction is Reduction.SUM else values.max())
    return reduced


def add_sums(total: dict[str, torch.Tensor], sums: Mapping[str, torch.Tensor]) -> None:
    """Adds `sums` to `total` in place, without reading a value back from the device."""
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value


def preference_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics from the sums of loss.preference.SUMS: means over pairs, over tokens if counted, and a correlation.

    'pairs' stays a sum, and is the only metric if it is 0; `rewards/length_correlation` is left out if undefined.
    """
    if not sums["pairs"]:
        return {"pairs": 0.0}
    means = {name: sums[name] / sums["pairs"] for name in (*STATISTICS, *LENGTHS)}
    means |= {name: sums[name] / sums[count] for name, count in TOKEN_STATISTICS.items() if sums[count]}
    correlation = _length_correlation(sums)
    if correlation is not None:
        means["rewards/length_correlation"] = correlation
    return means | {"pairs": sums["pairs"]}


# Below this ratio of squared spread to squared size a quantity counts as constant: less is the sums' rounding.
_CONSTANT = 1e-9
# Margins below this share of the log-probs that they are differences of count as rounding: the models are equal.
_ROUNDING = 1e-7


def _length_correlation(sums: Mapping[str, float]) -> float | None:
    """Pearson's r of the pairs' length gaps (chosen minus rejected tokens) and margins; None if either is constant."""
    pairs, margin = sums["pairs"], sums["rewards/margins"]
    gap = sums["lengths/chosen"] - sums["lengths/rejected"]
    gap_spread = pairs * sums["gap_x_gap"] - gap * gap
    margin_spread = pairs * sums["margin_x_margin"] - margin * margin
    gap_varies = gap_spread > _CONSTANT * pairs * sums["gap_x_gap"]
    margin_varies = margin_spread > _CONSTANT * pairs * sums["margin_x_margin"]
    rounding = _ROUNDING * (abs(sums["logps/chosen"]) + abs(sums["logps/rejected"]))
    if not (gap_varies and margin_varies and pairs * sums["margin_x_margin"] > rounding * rounding):
        return None
    r = (pairs * sums["gap_x_margin"] - gap * margin) / (math.sqrt(gap_spread) * math.sqrt(margin_spread))
    return min(1.0, max(-1.0, r))
