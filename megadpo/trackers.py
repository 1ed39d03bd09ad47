"""Where metrics go: one JSON object a line, and TensorBoard. Only global rank 0 owns trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one step's metrics."""
        ...

    def close(self) -> None:
        """Flushes and lets go of files."""
        ...


class JsonlTracker:
    """`metrics.jsonl`: one flushed object per logged step.

    Opened for a run that goes on from `resume_step` (0: a fresh start), it first drops the lines behind that step and a
    torn last line, so that the file reads as if the run had never been interrupted.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        kept = _lines_up_to(path, resume_step) if resume_step > 0 and path.exists() else []
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line, `step` first, and flushes it; a number that is not finite becomes null, which JSON has."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines_up_to(path: Path, last_step: int) -> list[str]:
    """Lines of a metrics file whose step is at most `last_step`; a line that is not JSON (torn by a kill) goes."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last_step:
            kept.append(line + "\n")
    return kept


class TensorBoardTracker:
    """Event files under `tensorboard/`, one scalar per metric; events behind `resume_step` (0: all) are hidden."""

    def __init__(self, directory: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the scalars of one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


def build_trackers(names: Sequence[str], run_dir: Path, *, resume_step: int) -> list[Tracker]:
    """The trackers of a run, by name."""
    builders: dict[str, Callable[[], Tracker]] = {
        "jsonl": lambda: JsonlTracker(run_dir / "metrics.jsonl", resume_step=resume_step),
        "tensorboard": lambda: TensorBoardTracker(run_dir / "tensorboard", resume_step=resume_step),
    }
    return [builders[name]() for name in names]
