"""Updates that were skipped because a number was not finite: counted, written down with their pairs, and bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from megadpo.data.loader import GlobalBatch
from megadpo.errors import MegaDPOError
from megadpo.forward_step import PAIR_NUMBERS, gather_pairs
from megadpo.runtime.files import write_durably, writing
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger
from megadpo.train.train_step import StepResult

logger = get_logger(__name__)

_MOST_NAMED = 16


class BadSteps:
    """Skipped updates of a run: `total` in all, those of earlier parts of the run too, and `in_a_row` of late.

    The same on every rank. A run that goes on from a checkpoint begins a new row. `place` tells where in the data a row
    is.
    """

    def __init__(
        self,
        directory: Path,
        *,
        most_in_a_row: int,
        total: int,
        place: Callable[[int], str],
        state: ParallelState,
        torch_device: torch.device,
    ) -> None:
        self.total = total
        self.in_a_row = 0
        self.most_in_a_row = most_in_a_row
        self._directory = directory
        self._place = place
        self._state = state
        self._device = torch_device

    @property
    def too_many(self) -> bool:
        """Whether there were so many in a row that the run is to stop."""
        return self.in_a_row >= self.most_in_a_row

    def end_row(self) -> None:
        """Says that an update was made."""
        self.in_a_row = 0

    def take(self, step: int, batch: GlobalBatch, result: StepResult) -> None:
        """Counts a skipped update, and writes its pairs to step_XXXXXXXX.json on rank 0, which warns.

        One all-gather of five numbers a pair. A file that can't be written is a part of the warning.
        """
        self.total += 1
        self.in_a_row += 1
        numbers_G5 = gather_pairs(batch, result.pair_numbers, len(PAIR_NUMBERS), self._state, self._device)
        if not self._state.is_main:
            return
        places = [self._place(row) for row in batch.pair_indices]
        rows = zip(batch.pair_indices, places, numbers_G5.tolist(), strict=True)
        pairs = [
            {"row": row, "where": place, **dict(zip(PAIR_NUMBERS, map(_number, numbers), strict=True))}
            for row, place, numbers in rows
        ]
        bad = [place for place, numbers in zip(places, numbers_G5, strict=True) if not np.isfinite(numbers).all()]
        report = {"step": step, "why": list(result.skipped), "grad_norm": _number(result.grad_norm), "pairs": pairs}
        logger.warning(
            "step %d IS SKIPPED, no weight was changed: %s. Pairs with such numbers: %s. %d steps skipped so far, %d "
            "in a row (at %d the run stops). %s",
            step,
            "; ".join(result.skipped),
            _few(bad) or "none, it came up in the backward pass or behind it",
            self.total,
            self.in_a_row,
            self.most_in_a_row,
            _written(self._directory / f"step_{step:08d}.json", json.dumps(report, indent=1, allow_nan=False) + "\n"),
        )


def _written(path: Path, text: str) -> str:
    """Writes the file; where it is, or why it is not there."""
    try:
        with writing(path.parent):
            path.parent.mkdir(exist_ok=True)
        write_durably(path, text)
    except MegaDPOError as error:
        return f"Its pairs are not written down: {error}"
    return f"Its pairs are in {path}"


def _number(value: float) -> float | str:
    """The number, or, as JSON has no others than finite ones, "nan", "inf" or "-inf"."""
    return value if math.isfinite(value) else str(value)


def _few(places: Sequence[str]) -> str:
    more = f" and {len(places) - _MOST_NAMED} more" if len(places) > _MOST_NAMED else ""
    return ", ".join(places[:_MOST_NAMED]) + more
