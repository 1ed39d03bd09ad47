"""The learning rate of every update is the one that transformers' schedules give, and reaches every parameter group."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from megadpo.optimizer.build import set_hyperparameters
from megadpo.optimizer.schedule import LearningRate

PEAK = 3e-4


def learning_rate(schedule: str, *, warmup: int, total: int, minimum: float = 0.0) -> LearningRate:
    return LearningRate(peak=PEAK, minimum=minimum, schedule=schedule, warmup_steps=warmup, total_steps=total)


def by_transformers(build: Callable[[torch.optim.Optimizer], Any], updates: int) -> list[float]:
    """The rate of each update when a torch optimizer is driven by a transformers schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = build(optimizer)
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int, int], Any]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (1, 10), (10, 10), (15, 10), (0, 1)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_transformers(schedule: str, warmup: int, total: int) -> None:
    expected = by_transformers(lambda optimizer: SCHEDULES[schedule](optimizer, warmup, total), total)
    rate = learning_rate(schedule, warmup=warmup, total=total)
    assert [rate.after(done) for done in range(total)] == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_cosine_with_a_minimum_equals_transformers() -> None:
    expected = by_transformers(
        lambda optimizer: get_cosine_with_min_lr_schedule_with_warmup(optimizer, 3, 12, min_lr=PEAK / 5), 12
    )
    rate = learning_rate("cosine", warmup=3, total=12, minimum=PEAK / 5)
    assert [rate.after(done) for done in range(12)] == pytest.approx(expected, rel=1e-12)


def test_linear_decay_to_a_minimum() -> None:
    rate = learning_rate("linear", warmup=2, total=6, minimum=1e-4)
    expected = [0.0, 1.5e-4, 3e-4, 2.5e-4, 2e-4, 1.5e-4, 1e-4]
    assert [rate.after(done) for done in range(7)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("minimum", [0.0, 1e-5, PEAK])
def test_stays_at_the_minimum_from_the_last_step_on(schedule: str, minimum: float) -> None:
    rate = learning_rate(schedule, warmup=2, total=10, minimum=minimum)
    assert [rate.after(done) for done in (10, 11, 50)] == pytest.approx([minimum] * 3, abs=1e-20)


def test_a_constant_rate_ignores_the_minimum() -> None:
    rate = learning_rate("constant", warmup=2, total=5, minimum=1e-5)
    assert [rate.after(done) for done in (2, 4, 5, 99)] == [PEAK] * 4


def test_hyperparameters_reach_every_group() -> None:
    """A loaded checkpoint brings the values of the run that wrote it; wd_mult and the parameters are a group's own."""
    decayed = {"params": ["w"], "wd_mult": 1.0, "lr": 9.0, "weight_decay": 9.0, "betas": (0.0, 0.0), "eps": 9.0}
    spared = {**decayed, "params": ["b"], "wd_mult": 0.0}
    optimizer = SimpleNamespace(param_groups=[decayed, spared])
    set_hyperparameters(optimizer, lr=1e-6, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-7)  # type: ignore[arg-type]
    common = {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-7}
    assert decayed == {"params": ["w"], "wd_mult": 1.0, "weight_decay": 0.1, **common}
    assert spared == {"params": ["b"], "wd_mult": 0.0, "weight_decay": 0.0, **common}
