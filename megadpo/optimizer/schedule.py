"""The learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate of every step, as a function of the number of updates done before it (TRL's convention)."""

    peak: float
    minimum: float
    schedule: str
    warmup_steps: int
    total_steps: int

    def after(self, steps_done: int) -> float:
        """The learning rate of the update after `steps_done` others.

        Linear warm-up from 0 over `warmup_steps`, then constant, linear or cosine decay to `minimum` at `total_steps`.
        """
        if steps_done < self.warmup_steps:
            return self.peak * steps_done / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        progress = (steps_done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        remaining = 1.0 - min(1.0, progress)
        if self.schedule == "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * (1.0 - remaining)))
        return self.minimum + (self.peak - self.minimum) * remaining
