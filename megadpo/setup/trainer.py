"""The loss, the settings and the health facts of a run, from its Config."""

from __future__ import annotations

from megadpo.config.choices import Dtype
from megadpo.config.reference_rules import LIVE
from megadpo.config.schema import Config
from megadpo.health.history import RunFacts
from megadpo.loss.preference import LOSSES, PreferenceLoss
from megadpo.optimizer.schedule import LearningRate
from megadpo.runtime.device import Device
from megadpo.setup.models import refers_to_start
from megadpo.setup.options import torch_dtype
from megadpo.train.first_step import NoPreference
from megadpo.train.trainer import LoopSettings

# How far the first loss may be from its value without preference. A live reference runs on the policy's schedule, so
# that only the mean rounds; cached log-probs were computed in another packing, or in another layout.
_LIVE_TOLERANCE, _CACHED_TOLERANCE, _CACHED_AND_ROUNDED_TOLERANCE = 1e-6, 1e-5, 1e-3


def build_loss(config: Config) -> PreferenceLoss:
    """The loss of a pair, or the mix of several."""
    loss = config.loss
    return PreferenceLoss(
        *(str(name) for name in loss.name),
        weights=loss.weights,
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        ipo_length_normalize=loss.ipo_length_normalize,
        discopop_tau=loss.discopop_tau,
        simpo_gamma=loss.simpo_gamma,
        f_divergence=str(loss.f_divergence),
        f_alpha_divergence_coef=loss.f_alpha_divergence_coef,
        ld_alpha=loss.ld_alpha,
    )


def loop_settings(config: Config, loss: PreferenceLoss, total_steps: int, device: Device) -> LoopSettings:
    """When to log, evaluate and save, the learning rate, what the first loss must be, and what a card can do."""
    return LoopSettings(
        total_steps=total_steps,
        log_every=config.train.log_every,
        eval_every=config.train.eval_every,
        save_every=config.train.save_every,
        check_every=config.precision.fp8_check_every,
        check_ranks_every=config.train.check_ranks_every,
        learning_rate=LearningRate(
            peak=config.optimizer.lr,
            minimum=config.optimizer.min_lr,
            schedule=str(config.optimizer.schedule),
            warmup_steps=config.optimizer.warmup_steps,
            total_steps=total_steps,
        ),
        no_preference=_no_preference(config, loss),
        sync_every=config.reference.sync_every,
        peak_flops=device.peak_flops(torch_dtype(config)),
    )


def health_facts(config: Config, loss: PreferenceLoss) -> RunFacts:
    """What judging a run's health must know of its settings."""
    return RunFacts(
        beta=loss.beta,
        has_reference=loss.needs_reference,
        loss_at_start=loss.value_without_preference,
        least_loss=loss.least_value,
        clip_grad=config.optimizer.clip_grad,
        peak_lr=config.optimizer.lr,
        has_preference=any(LOSSES[name].has_preference for name in loss.names),
        raises_chosen=all(LOSSES[name].raises_chosen for name in loss.names),
        aimed_drift=loss.aimed_drift,
    )


def _no_preference(config: Config, loss: PreferenceLoss) -> NoPreference | None:
    """What the first update must show because the reference is the starting policy; None where it is none."""
    if not refers_to_start(config) or not loss.needs_reference:
        return None
    value, precision = loss.value_without_preference, config.precision
    if config.reference.mode in LIVE:
        remedy = "The two models compute different numbers: the gradients would be wrong"
        return NoPreference(value, _LIVE_TOLERANCE, "live reference on the same schedule", remedy)
    exact = precision.dtype == Dtype.fp32 and precision.fp8 is None
    rounding = "fp32" if exact else "bf16" if precision.fp8 is None else "FP8"
    return NoPreference(
        value,
        _CACHED_TOLERANCE if exact else _CACHED_AND_ROUNDED_TOLERANCE,
        f"cached reference in {rounding}",
        f"What {config.reference.cache_dir} has of these pairs is not what this model computes: if another layout has "
        "filled it, fill one in this layout; or else something is wrong with it, and another directory is needed",
    )
