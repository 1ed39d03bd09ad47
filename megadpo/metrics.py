"""Values to log, each with the reduction that makes one number of all ranks' contributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch


class Reduction(Enum):
    """How the contributions of all ranks become one number."""

    SUM = "sum"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Metric:
    """One rank's contribution to a logged number; every rank names the same ones (0 where it knows nothing)."""

    value: float | torch.Tensor
    reduction: Reduction


def reduce_metrics(
    metrics: Mapping[str, Metric], *, gather: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> dict[str, float]:
    """The reduced value of every metric, on every rank; one `gather` ([K] → [world, K], fp64) for all of them."""
    if not metrics:
        return {}
    row_K = torch.stack([torch.as_tensor(m.value, dtype=torch.float64, device=device) for m in metrics.values()])
    rows = gather(row_K).cpu()
    reduced = {}
    for column, (name, metric) in enumerate(metrics.items()):
        values = rows[:, column]
        reduced[name] = float(values.sum() if metric.reduction is Reduction.SUM else values.max())
    return reduced


def add_sums(total: dict[str, torch.Tensor], sums: Mapping[str, torch.Tensor]) -> None:
    """Adds `sums` into `total` in place, without reading a value back from the device."""
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value


def preference_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over pairs from summed statistics that include the count under 'pairs'; the count itself stays a sum."""
    pairs = sums["pairs"]
    return {name: value if name == "pairs" else value / pairs for name, value in sums.items()}
