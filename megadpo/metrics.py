"""Values to log, each with the reduction that makes one number of all ranks' contributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from megadpo.losses import STATISTICS, TOKEN_STATISTICS


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
    on_host = [0.0 if isinstance(m.value, torch.Tensor) else m.value for m in metrics.values()]
    row_K = torch.tensor(on_host, dtype=torch.float64).to(device)  # one copy for all
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
    """Adds `sums` into `total` in place, without reading a value back from the device."""
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value


def preference_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over pairs, and over tokens where those were counted, from the sums of losses.SUMS; 'pairs' stays a sum."""
    means = {name: sums[name] / sums["pairs"] for name in STATISTICS}
    means |= {name: sums[name] / sums[count] for name, count in TOKEN_STATISTICS.items() if sums[count]}
    return means | {"pairs": sums["pairs"]}
