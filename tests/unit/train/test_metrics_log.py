"""Steps summed up to a line, and the line written."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megadpo.loss.preference import SUMS
from megadpo.optimizer.guarded_update import Update
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.train.metrics_log import Interval, MetricsLog
from megadpo.train.train_step import StepResult


def batch_of(rows: tuple[int, ...], tokens: int = 1) -> Any:
    """The numbers of a global batch that a log looks at."""
    return SimpleNamespace(
        **{"pair_indices": rows, "logical_tokens": tokens, "computed_tokens": tokens, "padding_tokens": 0},
        **{"flops": 1, "reference_flops": 1, "own_flops": 1},
    )


def test_a_line_of_several_updates_names_the_rows_of_the_steepest() -> None:
    mark: Any = None
    interval = Interval()
    for norm, rows in ((1.0, (1, 2)), (9.0, (3, 4)), (0.0, (5, 6))):
        result = StepResult({}, Update(norm, (), ()), (mark, mark), (mark, mark))
        interval.add(result, batch_of(rows), (mark, mark), 0.0)
    assert interval.largest_grad_norm_rows == (3, 4)


def test_skipped_updates_are_left_out_of_a_line() -> None:
    """Their sums may be NaN; their rows are not those of the steepest update."""
    mark: Any = None
    interval = Interval()
    for loss, norm, skipped in ((2.0, 1.0, ()), (math.nan, math.nan, ("the loss is not finite",))):
        update = Update(norm, (), skipped)
        result = StepResult({"loss": torch.tensor(loss)}, update, (mark, mark), (mark, mark))
        interval.add(result, batch_of((1, 2), tokens=3), (mark, mark), 0.5)
    assert (interval.steps, interval.updates, interval.logical_tokens, interval.data_s) == (2, 1, 6, 1.0)
    assert (float(interval.sums["loss"]), interval.grad_norm, interval.largest_grad_norm_rows) == (2.0, 1.0, (1, 2))


def test_a_line_of_steps_is_what_trackers_and_the_health_log_get() -> None:
    """Two updates and a skipped one become one line with the rows of the largest norm; the next line begins anew."""
    groups: Any = None
    one_rank = ParallelState(0, 1, 0, 1, 1, 0, 1, groups, groups)
    tracker, health = mock.Mock(), mock.Mock()
    device = Device("cpu", torch.device("cpu"))
    log = MetricsLog(
        trackers=[tracker], progress=mock.Mock(), health=health, state=one_rank, device=device, peak_flops=None
    )
    sums = {name: torch.tensor(1.0, dtype=torch.float64) for name in SUMS}

    def add(rows: tuple[int, int], norm: float, *skipped: str) -> None:
        log.add(StepResult(sums, Update(norm, (), skipped), (0.0, 0.0), (0.0, 0.0)), batch_of(rows), (0.0, 2.0), 0.5)

    with mock.patch("megadpo.train.metrics_log.gather_rows", lambda row_K: row_K[None]):
        add((1, 2), 4.0)
        add((3, 4), 6.0)
        add((5, 6), math.inf, "it is not finite")
        log.write_steps(7, lr=1e-6, epoch=0.5, skipped=1, reference_bytes=2**30)
        (step, metrics, rows), _ = health.observe.call_args
        add((7, 8), 1.0)
        log.write_steps(8, lr=1e-6, epoch=0.5, skipped=1, reference_bytes=0)
    assert (step, rows) == (7, (3, 4))
    assert (metrics["grad_norm"], metrics["time/step_s"], metrics["time/data_s"]) == (5.0, 2.0, 0.5)
    assert (metrics["pairs"], metrics["steps/skipped"], metrics["memory/reference_gib"]) == (2 / 3, 1, 1.0)
    assert tracker.log.call_args_list[0].args == (7, metrics)
    assert log.last_metrics["grad_norm"] == 1.0
