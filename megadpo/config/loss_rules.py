"""Rules of the loss: what can be mixed, and which keys the chosen losses read.

Every function gives its violations, [] for none; `validation.py` collects them.
"""

from __future__ import annotations

import math
from dataclasses import fields
from operator import attrgetter

from megadpo.config.choices import FDivergence, LossName
from megadpo.config.schema import LossConfig, show
from megadpo.loss_table import LOSSES


def check_loss(loss: LossConfig) -> list[str]:
    """What is wrong with the loss."""
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
    if LossName.exo_pair not in loss.name or loss.label_smoothing:
        return []
    return [
        "loss.label_smoothing=0.0: must be above 0 with loss.name=exo_pair, whose formula has its logarithm: "
        "loss.label_smoothing=1e-3 is the paper's value"
    ]


def _check_divergence(loss: LossConfig) -> list[str]:
    """f-DPO's rewards are known up to a function of the prompt, which only differences of two rewards get rid of."""
    violations = []
    able = [name for name in loss.name if "f_divergence" in LOSSES[name].knobs]
    others = [name for name in loss.name if LOSSES[name].needs_reference and name not in able]
    if loss.f_divergence != FDivergence.reverse_kl and able and others:
        violations.append(
            f"loss.f_divergence={loss.f_divergence}: must be reverse_kl with loss.name={_names(others)}, which looks "
            "at each response's reward alone: drop it from the mix, or use reverse_kl"
        )
    default = LossConfig().f_alpha_divergence_coef
    if loss.f_alpha_divergence_coef != default and loss.f_divergence != FDivergence.alpha:
        violations.append(
            f"loss.f_alpha_divergence_coef={show(loss.f_alpha_divergence_coef)}: has no effect with "
            f"loss.f_divergence={loss.f_divergence}: leave it at {show(default)}, or use loss.f_divergence=alpha"
        )
    return violations


def _check_unused(loss: LossConfig) -> list[str]:
    """A key that none of the chosen losses reads and that is not at its default."""
    violations = []
    defaults = LossConfig()
    read = {knob for name in loss.name for knob in LOSSES[name].knobs}
    for knob in (item.name for item in fields(LossConfig)):
        value, default = attrgetter(knob)(loss), attrgetter(knob)(defaults)
        readers = [name for name, spec in LOSSES.items() if knob in spec.knobs]
        if value != default and knob not in read and readers:
            violations.append(
                f"loss.{knob}={show(value)}: has no effect with loss.name={_names(loss.name)}: "
                f"leave it at {show(default)}, or use {' or '.join(f'loss.name={name}' for name in readers)}"
            )
    return violations


def _names(names: list[LossName]) -> str:
    return str(names[0]) if len(names) == 1 else show(names)
