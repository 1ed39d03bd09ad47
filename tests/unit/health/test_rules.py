"""Every threshold of the rules on a run's health: one course just inside it and one just outside; and the page's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megadpo.health import rules
from megadpo.health.history import LONG_WINDOW, TRAINED_PAIRS, History, RunFacts, read_line
from tests.helpers.health_histories import FACTS

PAGE = Path(__file__).parents[3] / "docs" / "health.md"
ALONE = replace(FACTS, has_reference=False)
Rule = Callable[[History, RunFacts], rules.Finding | None]

EVEN = {
    **{"loss": 0.69, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0},
    **{"rewards/accuracies": 0.6, "lengths/chosen": 100.0, "lengths/rejected": 100.0},
    **{"grad_norm": 0.5, "lr": FACTS.peak_lr, "pairs": 64.0},
}


def history(*parts: tuple[int, dict[str, float]]) -> History:
    """Of so many lines each with these values in place of even ones."""
    heard, step = History(), 0
    for count, values in parts:
        for _ in range(count):
            step += 1
            line = read_line(step, EVEN | values, updates=1)
            assert line is not None
            heard.add(line)
    return heard


def fallen(by: float, gained: float = 0.0) -> History:
    """The chosen reward falls in a straight line over the long window, whose mean is so far below the first's."""
    share = [2 * (i + 1) / (LONG_WINDOW + 1) for i in range(LONG_WINDOW)]
    parts = [(1, {"rewards/chosen": -by * part, "rewards/margins": gained}) for part in share]
    return history((8, {}), *parts)


def error_of(by: float) -> float:
    """Three standard errors of that window's mean."""
    values = [2 * by * (i + 1) / (LONG_WINDOW + 1) for i in range(LONG_WINDOW)]
    mean = sum(values) / LONG_WINDOW
    return 3 * math.sqrt(sum((value - mean) ** 2 for value in values) / (LONG_WINDOW - 1) / LONG_WINDOW)


CLEAR = 1 - error_of(1.0)  # of a fall
FLAT_ERROR = 0.5 / math.sqrt(64 * LONG_WINDOW)


def far(per_token: float, tokens: float) -> History:
    reward = FACTS.beta * per_token * tokens
    away = {"rewards/chosen": reward, "rewards/rejected": -reward}
    return history((8, away | {"lengths/chosen": tokens, "lengths/rejected": tokens}))


def correlated(r: float, pairs: float = 64.0) -> History:
    return history((TRAINED_PAIRS // 64 + 1, {"rewards/length_correlation": r, "pairs": pairs}))


def spike(metric: str, size: float, *, spread: float = 0.0, before: int = 64) -> History:
    """Values that alternate by that spread in their logarithms, and one that is larger by its own."""
    lines = [(1, {metric: math.exp(spread * (-1) ** i)}) for i in range(before)]
    return history(*lines, (1, {metric: math.exp(size)}))


def clipped(updates: int, of: int = 100) -> History:
    return history((of - updates, {}), (updates, {"grad_norm": 1.01}))


def uneven(weight: float) -> History:
    """Eight blocks whose correlations count so much together."""
    lines = history((TRAINED_PAIRS // 64 + 8, {"rewards/length_correlation": 0.9}))
    for index, block in enumerate(lines.blocks):
        lines.blocks[index] = replace(block, length_weight=weight / 8)
    return lines


CASES: list[tuple[Rule, History, History, RunFacts]] = [
    (rules.chosen_reward_falling, fallen(0.255 / CLEAR), fallen(0.245 / CLEAR), FACTS),
    (rules.chosen_reward_falling, fallen(3.06 / CLEAR, 2.0), fallen(2.94 / CLEAR, 2.0), FACTS),
    (rules.chosen_reward_falling, fallen(0.0102 / CLEAR), fallen(0.0098 / CLEAR), ALONE),
    (
        rules.chosen_reward_falling,
        history((8, {}), (16, {"rewards/chosen": -1.0}), (16, {"rewards/chosen": -1.001})),
        history((8, {}), (16, {"rewards/chosen": -1.001}), (16, {"rewards/chosen": -1.0})),
        FACTS,
    ),
    (rules.margin_saturating, history((8, {"loss": 0.069})), history((8, {"loss": 0.0695})), FACTS),
    (
        rules.margin_saturating,
        history((8, {"loss": 0.264})),
        history((8, {"loss": 0.266})),
        replace(FACTS, least_loss=0.2174),
    ),
    (
        rules.accuracy_flat,
        history((65, {"rewards/accuracies": 0.5 + 0.99 * FLAT_ERROR})),
        history((65, {"rewards/accuracies": 0.5 + 1.01 * FLAT_ERROR})),
        FACTS,
    ),
    (
        rules.accuracy_flat,
        history((65, {"rewards/accuracies": 0.5})),
        history((63, {"rewards/accuracies": 0.5})),
        FACTS,
    ),
    (
        rules.accuracy_flat,
        history((8, {}), (64, {"rewards/accuracies": 0.599})),
        history((8, {}), (64, {"rewards/accuracies": 0.601})),
        ALONE,
    ),
    (
        rules.accuracy_flat,
        history((8, {}), (64, {"rewards/accuracies": 0.599})),
        history((8, {}), (64, {"rewards/accuracies": 0.599, "rewards/margins": 0.001})),
        ALONE,
    ),
    (rules.kl_drift, far(1.01, 100.0), far(0.99, 100.0), FACTS),
    (rules.kl_drift, far(2.0, 25.3), far(2.0, 24.7), FACTS),
    (rules.kl_drift, far(5.05, 100.0), far(4.95, 100.0), replace(FACTS, aimed_drift=2.5)),
    (rules.length_bias, correlated(0.505), correlated(0.495), FACTS),
    (rules.length_bias, correlated(-0.505), correlated(-0.495), FACTS),
    (rules.length_bias, uneven(256.1), uneven(255.9), FACTS),
    (rules.gradient_always_clipped, clipped(95), clipped(94), FACTS),
    (rules.gradient_always_clipped, clipped(100), clipped(99, of=99), FACTS),
    (rules.loss_spike, spike("loss", math.log(2.02)), spike("loss", math.log(1.98)), FACTS),
    (rules.grad_norm_spike, spike("grad_norm", math.log(10.1)), spike("grad_norm", math.log(9.9)), FACTS),
    (
        rules.grad_norm_spike,
        spike("grad_norm", 6.05 * 1.4826 * 0.5, spread=0.5),
        spike("grad_norm", 5.95 * 1.4826 * 0.5, spread=0.5),
        FACTS,
    ),
    (rules.loss_spike, spike("loss", 1.0, before=32), spike("loss", 1.0, before=31), FACTS),
]


@pytest.mark.parametrize(("rule", "inside", "outside", "facts"), CASES)
def test_a_rule_holds_up_to_its_threshold(rule: Rule, inside: History, outside: History, facts: RunFacts) -> None:
    assert rule(inside, facts) is not None
    assert rule(outside, facts) is None


def told(value: float) -> str:
    return f"{value:g}"


NUMBERS: dict[str, Iterable[Any]] = {
    "chosen_reward_falling": (rules.FALL, rules.FALL_PER_TOKEN),
    "kl_drift": (rules.DRIFT_PER_TOKEN, rules.DRIFT_PER_RESPONSE),
    "length_bias": (rules.LENGTH_CORRELATION, TRAINED_PAIRS),
    "accuracy_flat": (TRAINED_PAIRS,),
    "gradient_always_clipped": (100 * rules.CLIPPED_SHARE, 100),
    "loss_spike": (rules.SPIKE_LINES, rules.SPIKE_DEVIATIONS, rules.SPIKE_LINES // 2),
    "grad_norm_spike": (rules.NORM_FACTOR,),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_page_has_the_rules_numbers(name: str) -> None:
    (row,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    words = row.replace(",", " ").replace(";", " ").split()
    assert [told(value) for value in NUMBERS[name] if told(value) not in words] == []
