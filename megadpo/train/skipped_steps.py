"""Updates that were skipped because a number was not finite: counted, written down with their pairs, and bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megadpo.data.loader import GlobalBatch
from megadpo.data.store import PairView
from megadpo.errors import MegaDPOError
from megadpo.forward_step import PAIR_NUMBERS, gather_pairs
from megadpo.runtime.files import write_durably, writing
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger
from megadpo.train.train_step import StepResult

logger = get_logger(__name__)

_MOST_NAMED = 16


class SkippedSteps:
    """Counts the skipped updates of a run and writes down their pairs.

    `total` counts all of the run, also those before it was resumed; `streak` those since the last update that was made,
    or since the run was resumed. Both are the same on every rank.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit: int,
        total: int,
        pairs: PairView,
        state: ParallelState,
        torch_device: torch.device,
    ) -> None:
        """`limit` is the streak at which the run stops; `pairs` are the training pairs."""
        self.total = total
        self.streak = 0
        self.limit = limit
        self._directory = directory
        self._pairs = pairs
        self._state = state
        self._torch_device = torch_device

    @property
    def limit_reached(self) -> bool:
        """True if the run must stop."""
        return self.streak >= self.limit

    def reset_streak(self) -> None:
        """Notes that an update was made."""
        self.streak = 0

    def record(self, step: int, batch: GlobalBatch, result: StepResult) -> None:
        """Counts a skipped update, and writes its pairs to step_XXXXXXXX.json on rank 0, which warns.

        One all-gather of five numbers a pair. A file that can't be written is a part of the warning.
        """
        self.total += 1
        self.streak += 1
        numbers_G5 = gather_pairs(batch, result.pair_numbers, len(PAIR_NUMBERS), self._state, self._torch_device)
        if not self._state.is_main:
            return
        update = result.update
        locations = [self._pairs.where(row) for row in batch.pair_indices]
        rows = zip(batch.pair_indices, locations, numbers_G5.tolist(), strict=True)
        pairs = [
            {"row": row, "where": location, **dict(zip(PAIR_NUMBERS, map(_number, numbers), strict=True))}
            for row, location, numbers in rows
        ]
        bad = [
            location for location, numbers in zip(locations, numbers_G5, strict=True) if not np.isfinite(numbers).all()
        ]
        report = {"step": step, "why": list(update.skipped), "grad_norm": _number(update.grad_norm), "pairs": pairs}
        logger.warning(
            "step %d IS SKIPPED, no weight was changed: %s. Pairs with such numbers: %s. %d steps skipped so far, %d "
            "in a row (at %d the run stops). %s",
            step,
            "; ".join(update.skipped),
            _few(bad) or "none, it came up in the backward pass or behind it",
            self.total,
            self.streak,
            self.limit,
            _written(self._directory / f"step_{step:08d}.json", json.dumps(report, indent=1, allow_nan=False) + "\n"),
        )


def _written(path: Path, text: str) -> str:
    """Writes the file; returns a sentence that says where it is, or why it is not there."""
    try:
        with writing(path.parent):
            path.parent.mkdir(exist_ok=True)
        write_durably(path, text)
    except MegaDPOError as error:
        return f"Its pairs are not written down: {error}"
    return f"Its pairs are in {path}"


def _number(value: float) -> float | str:
    """The number; "nan", "inf" or "-inf" for one that JSON can't hold."""
    return value if math.isfinite(value) else str(value)


def _few(locations: Sequence[str]) -> str:
    more = f" and {len(locations) - _MOST_NAMED} more" if len(locations) > _MOST_NAMED else ""
    return ", ".join(locations[:_MOST_NAMED]) + more
