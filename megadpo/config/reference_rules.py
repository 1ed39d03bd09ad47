"""Rules of the reference: losses that go with a mode, and keys that have an effect in it."""

from __future__ import annotations

from megadpo.config.choices import ReferenceMode
from megadpo.config.loss_rules import names_of
from megadpo.config.schema import Config, ReferenceConfig, show
from megadpo.loss.table import REFERENCE_FREE, needs_reference

LIVE = (ReferenceMode.resident, ReferenceMode.offload)


def check_reference_keys(config: Config) -> list[str]:
    """Violations of the keys about the reference, [] for none."""
    reference = config.reference
    return [*_check_losses(config), *_check_effects(reference), *_check_sync(reference), *_check_monitor(config)]


def _check_losses(config: Config) -> list[str]:
    names, mode = config.loss.name, config.reference.mode
    free = ", ".join(sorted(REFERENCE_FREE))
    if not names:
        return []  # reported by the rules of losses
    needed = needs_reference(names)
    if mode == ReferenceMode.none and needed:
        return [
            f"reference.mode=none: loss.name={names_of(names)} compares with a reference: choose "
            f"reference.mode=resident, offload or cached, or a loss that needs none ({free})"
        ]
    if mode != ReferenceMode.none and not needed:
        return [
            f"reference.mode={mode}: has no effect with loss.name={names_of(names)}, which uses no reference: use "
            "reference.mode=none"
        ]
    return []


def _check_effects(reference: ReferenceConfig) -> list[str]:
    violations = []
    if reference.hf_path is not None and reference.mode == ReferenceMode.none:
        violations.append(
            f"reference.hf_path={reference.hf_path}: has no effect with reference.mode=none: drop it, or choose "
            "another mode"
        )
    if reference.cache_dir is not None and reference.mode != ReferenceMode.cached:
        violations.append(
            f"reference.cache_dir={reference.cache_dir}: has no effect with reference.mode={reference.mode}: drop it, "
            "or use reference.mode=cached"
        )
    return violations


def _check_sync(reference: ReferenceConfig) -> list[str]:
    violations = []
    if reference.sync_every is not None and reference.mode not in LIVE:
        violations.append(
            f"reference.sync_every={reference.sync_every}: needs weights to mix, reference.mode={reference.mode} has "
            "none: use reference.mode=resident or offload, or drop it"
        )
    if reference.sync_every is None and reference.sync_mix != ReferenceConfig().sync_mix:
        violations.append(
            f"reference.sync_mix={show(reference.sync_mix)}: has no effect without reference.sync_every: set it, or "
            "drop sync_mix"
        )
    return violations


def _check_monitor(config: Config) -> list[str]:
    every = config.precision.fp8_check_every
    if every is None or config.reference.mode != ReferenceMode.cached:
        return []
    return [
        f"precision.fp8_check_every={every}: needs a reference to score with and without FP8, reference.mode=cached "
        "has its numbers only: drop it, or use reference.mode=resident or offload"
    ]
