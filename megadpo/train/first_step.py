"""The check of the first update where policy and reference are the same weights: its loss is known in advance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megadpo.errors import TrainingError


@dataclass(frozen=True, slots=True)
class ExpectedFirstLoss:
    """The loss of a policy beside itself, and how far from it the first one may be.

    `value` is None where a part of the loss has no reference, so that only rewards are known: they are 0. `reason`
    says why the tolerance is what it is, `remedy` what to do where the loss is off.
    """

    value: float | None
    tolerance: float
    reason: str
    remedy: str


def check_first_loss(step: int, means: Mapping[str, float], expected: ExpectedFirstLoss) -> None:
    """Raises TrainingError where the means of the first update are not those of equal policy and reference."""
    chosen, rejected = means["rewards/chosen"], means["rewards/rejected"]
    if expected.value is None:
        error, allowed = max(abs(chosen), abs(rejected)), expected.tolerance
        found, due, beside = f"rewards are {chosen:.3e} and {rejected:.3e}", "they must be 0", ""
    else:
        error, allowed = abs(means["loss"] - expected.value), expected.tolerance * max(1.0, expected.value)
        found, due = f"the loss is {means['loss']:.9f}", f"it must be {expected.value:.9f}"
        beside = f"; rewards {chosen:.3e} and {rejected:.3e} must be 0"
    if not error <= allowed:
        raise TrainingError(
            f"step {step}: {found}; policy and reference are the same weights, so {due} (tolerance "
            f"{expected.tolerance:g}, {expected.reason}{beside}). {expected.remedy}. Nothing was saved."
        )
