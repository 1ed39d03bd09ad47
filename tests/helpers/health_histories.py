"""Training lines of simulated runs, pair by pair, for the rules on a run's health."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megadpo.health.history import RunFacts

BETA = 0.1
FACTS = RunFacts(
    beta=BETA, has_reference=True, loss_at_start=float(np.log(2)), least_loss=0.0, clip_grad=1.0, peak_lr=1e-6
)


@dataclass(frozen=True, slots=True)
class Course:
    """How a simulated run goes.

    At share t of the run (0 to 1) a pair's margin is normal with `margin(t)` · (quality, 1), its chosen reward has the
    mean `chosen(t)`, and the gradient norm is log-normal around `norm` · the mean of 2·σ(−margin). `per_token`
    times that `margin(t)` is added for every token that the chosen response is longer.
    """

    margin: Callable[[float], float] = lambda t: 2.0 * min(1.0, 2 * t)
    quality: float = 0.6
    chosen: Callable[[float], float] = lambda t: -0.1 * t
    spread: float = 1.0
    norm: float = 0.4
    norm_spread: float = 0.4
    per_token: float = 0.0
    tokens: float = 200.0
    warmup: float = 0.1


def training_lines(
    course: Course,
    *,
    seed: int = 0,
    updates: int = 300,
    batch: int = 64,
    log_every: int = 1,
    epoch: int = 0,
    last: int = 0,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and metrics of a run that goes so; a line is a mean over `log_every` updates.

    Every `epoch`th update has `last` pairs only. A gradient's norm goes by the root of its pairs: it is mostly noise.
    """
    random = np.random.default_rng(seed)
    for step in range(log_every, updates + 1, log_every):
        of_updates = range(step - log_every + 1, step + 1)
        sizes = np.array([last if epoch and update % epoch == 0 else batch for update in of_updates])
        t, pairs = step / updates, int(sizes.sum())
        size = course.margin(t)
        lengths = random.lognormal(np.log(course.tokens), 0.5, (2, pairs)).round().clip(1)
        margin = size * (course.quality + random.standard_normal(pairs)) + size * course.per_token * (
            lengths[0] - lengths[1]
        )
        chosen = course.chosen(t) + course.spread * size * random.standard_normal(pairs)
        with np.errstate(over="ignore"):
            weight = 2 / (1 + np.exp(margin))
        noise = random.lognormal(0, course.norm_spread, log_every)
        line = {
            "loss": float(np.logaddexp(0, -margin).mean()),
            "rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float((chosen - margin).mean()),
            "rewards/margins": float(margin.mean()),
            "rewards/accuracies": float((margin > 0).mean()),
            "grad_norm": float(course.norm * weight.mean() * (noise * np.sqrt(batch / sizes)).mean()),
            "lr": FACTS.peak_lr * min(1.0, t / course.warmup),
            "pairs": pairs / log_every,
            "lengths/chosen": float(lengths[0].mean()),
            "lengths/rejected": float(lengths[1].mean()),
        }
        gap = lengths[0] - lengths[1]
        if margin.std() > 0 and gap.std() > 0:
            line["rewards/length_correlation"] = float(np.corrcoef(gap, margin)[0, 1])
        yield step, line


def good_course(seed: int) -> tuple[Course, dict[str, int]]:
    """A run that learns, and its batch size and length, all drawn by `seed`: slow or fast, noisy or not.

    Gradient norms are those of public runs, from a tenth of the usual clip to seventy times it; chosen rewards rise or
    fall by up to 1.2 times what the margin gains, as theirs do.
    """
    random = np.random.default_rng(seed)
    most, pace = random.uniform(0.6, 3.0), random.uniform(1.0, 4.0)
    slope, quality = random.uniform(-1.2, 0.2), random.uniform(0.25, 1.0)
    course = Course(
        margin=lambda t: most * (1 - float(np.exp(-pace * t))),
        quality=quality,
        chosen=lambda t: slope * quality * most * (1 - float(np.exp(-pace * t))),
        spread=random.uniform(0.5, 1.5),
        norm=float(10 ** random.uniform(-1, 1.85)),
        norm_spread=random.uniform(0.1, 0.6),
        per_token=float(random.choice([0.0, 0.001, -0.001])),
        tokens=random.uniform(100, 400),
    )
    batch = int(random.choice([4, 16, 64, 256]))
    updates = 10_000 // batch + 200
    return course, {
        "seed": seed,
        "batch": batch,
        "updates": updates,
        "log_every": int(random.choice([1, 1, 5])),
        "epoch": updates // int(random.integers(2, 7)),
        "last": int(random.integers(1, 4)),
    }
