"""What a person sees of a run: a progress bar in a terminal, and one line of text per logged step everywhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megadpo.rank_logging import get_logger

logger = get_logger(__name__)


class TrainingProgress:
    """Reports logged steps; draws a bar while it is entered, where stderr is a terminal."""

    def __init__(self, steps_done: int, total_steps: int, *, visible: bool) -> None:
        self._total = total_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not (visible and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=steps_done, loss="", accuracy="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar to `step` and logs a line of the numbers that a person follows."""
        if "loss" in metrics:
            self._bar.update(
                self._task,
                completed=step,
                loss=f"{metrics['loss']:.4f}",
                accuracy=f"{metrics['rewards/accuracies']:.2f}",
            )
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
