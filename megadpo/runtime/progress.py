"""Progress for people: a bar in a terminal, and one line of text per logged step everywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from threading import Lock
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

Bar = TypeVar("Bar", bound="ProgressBar")


# Interval of log lines that replace the bar where there is no terminal.
_SECONDS_BETWEEN_LINES = 20.0


class ProgressBar:
    """A progress bar with a title and a note, drawn while entered if stderr is a terminal and it is `visible`."""

    def __init__(self, title: str, *, total: int, done: int = 0, visible: bool, in_bytes: bool = False) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not (visible and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task(title, total=total, completed=done, note="")
        self._title = title
        self._silent = not visible
        self._last_line = time.monotonic()

    def __enter__(self: Bar) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def move(self, done: int, note: str) -> None:
        """Moves the bar to `done`."""
        self._bar.update(self._task, completed=done, note=note)

    def update(self, done: int, note: str) -> None:
        """Moves the bar to `done`; without a terminal, logs a line every 20 seconds instead."""
        self.move(done, note)
        now = time.monotonic()
        if not self._silent and self._bar.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            logger.info("%s: %s", self._title, note)


class ByteProgress(ProgressBar):
    """Progress in bytes, counted by several threads."""

    def __init__(self, title: str, *, visible: bool) -> None:
        super().__init__(title, total=0, visible=visible, in_bytes=True)
        self._done = self._total = 0
        self._lock = Lock()

    def begin(self, total: int) -> None:
        """Sets the total number of bytes."""
        self._total = total
        self._bar.update(self._task, total=total)

    def advance(self, count: int) -> None:
        """Adds `count` bytes to those that are done."""
        with self._lock:
            self._done += count
            self.update(self._done, f"{self._done / 2**30:.1f} of {self._total / 2**30:.1f} GiB")


class TrainingProgress(ProgressBar):
    """Progress of a training, step by step."""

    def __init__(self, steps_done: int, total_steps: int, *, visible: bool) -> None:
        super().__init__("training", total=total_steps, done=steps_done, visible=visible)
        self._total = total_steps

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar to `step` and logs a line of the main metrics."""
        if "loss" in metrics:
            self.move(step, f"loss {metrics['loss']:.4f}  accuracy {metrics['rewards/accuracies']:.2f}")
            logger.info(
                "step %d/%d  loss %.5f  accuracy %.3f  margin %+.4f  grad norm %.3f  lr %.2e  %.2f s/step",
                step,
                self._total,
                metrics["loss"],
                metrics["rewards/accuracies"],
                metrics["rewards/margins"],
                metrics["grad_norm"],
                metrics["lr"],
                metrics["time/step_s"],
            )
            return
        if "fp8/margin_error" in metrics:
            logger.info(
                "fp8 after %d steps: margins off by %.4f, at most %.4f (the policy's alone %.4f)",
                step,
                metrics["fp8/margin_error"],
                metrics["fp8/margin_error_max"],
                metrics["fp8/policy_margin_error"],
            )
            return
        for name in sorted({key.rpartition("/loss")[0] for key in metrics if key.endswith("/loss")}):
            logger.info(
                "%s after %d steps: loss %.5f  accuracy %.3f  margin %+.4f  policy alone %.3f  (%d pairs)",
                name,
                step,
                metrics[f"{name}/loss"],
                metrics[f"{name}/rewards/accuracies"],
                metrics[f"{name}/rewards/margins"],
                metrics[f"{name}/logps/accuracies"],
                metrics[f"{name}/pairs"],
            )
