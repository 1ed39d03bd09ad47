"""Rules of the loss: mixes that are possible, and keys that the chosen losses read.

Every function returns its violations, [] for none; `validation.py` collects them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter

from megadpo.config.choices import FDivergence, LossName
from megadpo.config.schema import LossConfig, show
from megadpo.loss.table import LOSSES


def check_loss(loss: LossConfig) -> list[str]:
    """Violations of the keys about the loss."""
    if not loss.name:
        return [f"loss.name=[]: must name a loss: choose of {', '.join(map(str, LossName))}"]
    return [*_check_mix(loss), *_check_smoothing(loss), *_check_divergence(loss), *_check_unused(loss)]


def _check_mix(loss: LossConfig) -> list[str]:
    violations = []
    if len(set(loss.name)) < len(loss.name):
        violations.append(f"loss.name={show(loss.name)}: must name each loss once: give one of them a larger weight")
    if loss.weights is None:
        return violations
    weights = f"loss.weights={show(loss.weights)}"
    if len(loss.weights) != len(loss.name):
        violations.append(f"{weights}: must be one number for each of loss.name={show(loss.name)}, in its order")
    if not all(0 < weight < math.inf for weight in loss.weights):
        violations.append(f"{weights}: each must be a finite number > 0: drop a loss that is not to count")
    return violations


def _check_smoothing(loss: LossConfig) -> list[str]:
    if loss.label_smoothing:
        return []
    reasons = {
        LossName.exo_pair: "whose formula has its logarithm: loss.label_smoothing=1e-3 is the paper's value",
        LossName.robust: "which is loss.name=sigmoid at 0: give the share of labels that are wrong, or use sigmoid",
    }
    return [
        f"loss.label_smoothing=0.0: must be above 0 with loss.name={name}, {reason}"
        for name, reason in reasons.items()
        if name in loss.name
    ]


def _check_divergence(loss: LossConfig) -> list[str]:
    violations = []
    others = _alone_in_rewards(loss)
    if loss.f_divergence != FDivergence.reverse_kl and others:
        violations.append(
            f"loss.f_divergence={loss.f_divergence}: must be reverse_kl with loss.name={names_of(others)}, which looks "
            "at each response's reward alone, and f-divergences leave a function of the prompt in it open: use "
            "reverse_kl, or other losses"
        )
    default = LossConfig().f_alpha_divergence_coef
    if loss.f_alpha_divergence_coef != default and loss.f_divergence != FDivergence.alpha:
        violations.append(
            f"loss.f_alpha_divergence_coef={show(loss.f_alpha_divergence_coef)}: has no effect with "
            f"loss.f_divergence={loss.f_divergence}: leave it at {show(default)}, or use loss.f_divergence=alpha"
        )
    return violations


def _alone_in_rewards(loss: LossConfig) -> list[LossName]:
    """Those of the losses that use the reward of a single response."""
    specs = {name: LOSSES[name] for name in loss.name}
    return [name for name, spec in specs.items() if spec.needs_reference and "f_divergence" not in spec.knobs]


def _check_unused(loss: LossConfig) -> list[str]:
    """Violations by keys that are not at their default although none of the chosen losses reads them."""
    violations = []
    defaults = LossConfig()
    read = {knob for name in loss.name for knob in LOSSES[name].knobs}
    if _alone_in_rewards(loss):
        read.add("f_divergence")  # refused for that reason
    for knob in (item.name for item in fields(LossConfig)):
        value, default = attrgetter(knob)(loss), attrgetter(knob)(defaults)
        readers = [name for name, spec in LOSSES.items() if knob in spec.knobs]
        if value != default and knob not in read and readers:
            others = f"loss.name={readers[0]}" if len(readers) == 1 else f"one of loss.name={', '.join(readers)}"
            rewards = " but on the scale of logged rewards" if knob == "beta" else ""
            violations.append(
                f"loss.{knob}={show(value)}: has no effect with loss.name={names_of(loss.name)}{rewards}: leave it at "
                f"{show(default)}, or use {others}"
            )
    return violations


def names_of(names: Sequence[LossName]) -> str:
    """Formats losses as they are written after `loss.name=`."""
    return str(names[0]) if len(names) == 1 else show(names)
