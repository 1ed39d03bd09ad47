"""Inputs of the rules on a run's health: training lines of metrics.jsonl, merged to blocks and windows.

Most rules use blocks: lines merged until they have BLOCK_PAIRS pairs, or a single line with more. "The window" is the
latest WINDOW blocks, 512 pairs or more, the long window the latest LONG_WINDOW; means over them are over their pairs.
So the certainty of a rule hardly depends on the batch size, and its cost is the same in every run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCK_PAIRS = 64
WINDOW = 8
LONG_WINDOW = 32  # 2048 pairs, in which an accuracy of 0.55 is 4.5 standard errors above chance
TRAINED_PAIRS = 4096
CLIPPED_UPDATES = 100
SPIKE_LINES = 64


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts about a run that the rules need besides its lines.

    `beta` scales rewards, which are log-ratios if there is a reference, else log-probs per token. `loss_at_start` and
    `least_loss` are the loss of a pair without preference and the lowest possible one, None if they depend on the data.
    `clip_grad` is 0 without clipping, `peak_lr` the largest learning rate of the schedule. `has_preference`: a part of
    the loss compares the two responses. `raises_chosen`: no part of it lowers the chosen response. `aimed_drift` is the
    distance from the reference at which the loss has its minimum, in nats per token; 0 if it has none.
    """

    beta: float
    has_reference: bool
    loss_at_start: float | None
    least_loss: float | None
    clip_grad: float
    peak_lr: float
    has_preference: bool = True
    raises_chosen: bool = True
    aimed_drift: float = 0.0


@dataclass(frozen=True, slots=True)
class Line:
    """One training line of metrics.jsonl, or several merged: means over pairs, and the numbers of updates and pairs.

    `length_weight` is the weight of `length_correlation`: a line's pairs minus one, the inverse variance of a
    correlation by chance; 0 if there is no correlation.
    """

    step: int
    updates: int
    pairs: float
    means: Mapping[str, float]
    length_correlation: float
    length_weight: float

    def __getitem__(self, metric: str) -> float:
        """The mean of a metric, by its name in metrics.jsonl."""
        return self.means[metric]


_MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "lengths/chosen",
    "lengths/rejected",
    "grad_norm",
    "lr",
)


def read_line(step: int, metrics: Mapping[str, float | None], *, updates: int) -> Line | None:
    """Reads the training line of `updates` updates up to `step`; None for other lines, or if a number is not finite."""
    values = {name: metrics.get(name) for name in (*_MEANS, "pairs")}
    means = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    if len(means) < len(values):
        return None
    pairs = means.pop("pairs") * updates
    correlation = metrics.get("rewards/length_correlation")
    weight = 0.0 if correlation is None else pairs - 1
    return Line(step, updates, pairs, means, length_correlation=correlation or 0.0, length_weight=weight)


def merge_lines(lines: Sequence[Line]) -> Line:
    """Merges consecutive lines to one, with the last one's step."""
    pairs = sum(line.pairs for line in lines)
    weight = sum(line.length_weight for line in lines)
    correlation = sum(line.length_weight * line.length_correlation for line in lines)
    return Line(
        step=lines[-1].step,
        updates=sum(line.updates for line in lines),
        pairs=pairs,
        means={name: sum(line.pairs * line[name] for line in lines) / pairs for name in _MEANS},
        length_correlation=correlation / weight if weight else 0.0,
        length_weight=weight,
    )


class History:
    """The latest lines and blocks of a run, as many as the rules use, its first window, and totals of the training."""

    def __init__(self, *, whole: bool = True) -> None:
        """`whole`: it starts at the run's beginning, so that the first window is that of an untrained policy."""
        self.whole = whole
        self.lines: deque[Line] = deque(maxlen=max(CLIPPED_UPDATES, SPIKE_LINES + 1))
        self.blocks: deque[Line] = deque(maxlen=LONG_WINDOW)
        self.first: Line | None = None
        self.updates = 0
        self.pairs = 0.0
        self.lr_pairs = 0.0
        self._open: list[Line] = []

    def add(self, line: Line) -> bool:
        """Appends a line; returns True if that completes a block."""
        self.lines.append(line)
        self.updates += line.updates
        self.pairs += line.pairs
        self.lr_pairs += line["lr"] * line.pairs
        self._open.append(line)
        if sum(line.pairs for line in self._open) < BLOCK_PAIRS:
            return False
        self.blocks.append(merge_lines(self._open))
        self._open = []
        if self.first is None and len(self.blocks) >= WINDOW:
            self.first = merge_lines(list(self.blocks))
        return True

    def has_trained(self, facts: RunFacts) -> bool:
        """True if TRAINED_PAIRS pairs are done, each weighted by its learning rate relative to the peak."""
        return self.lr_pairs >= TRAINED_PAIRS * facts.peak_lr

    def latest(self, blocks: int) -> list[Line]:
        """The latest `blocks` blocks in order; [] if there are fewer."""
        return list(self.blocks)[-blocks:] if len(self.blocks) >= blocks else []
