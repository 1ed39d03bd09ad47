"""Builds the pieces of a run from its Config: reference, policy, loss. Configuration objects stop here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megadpo.checkpoint.directory import stored_dtype
from megadpo.checkpoint.state import load_checkpoint, load_weights
from megadpo.compute import data_parallel_options, fp8_settings, model_options, optimizer_options, torch_dtype
from megadpo.config.choices import Dtype, ReferenceMode
from megadpo.config.reference_rules import LIVE
from megadpo.config.schema import Config
from megadpo.data.loader import BatchBuilder, BatchShape
from megadpo.errors import ConfigError
from megadpo.health.history import RunFacts
from megadpo.loss.preference import LOSSES, PreferenceLoss
from megadpo.model_source import ModelSource
from megadpo.models.builder import build_model, load_model
from megadpo.models.conversion.load_save import check_hf_weights
from megadpo.models.conversion.safetensors_io import hf_weight_files
from megadpo.models.fp8_recipes import token_multiple
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.models.policy import PolicyModel
from megadpo.models.quantised import count_quantised
from megadpo.optimizer.build import Policy, build_optimizer, wrap_data_parallel
from megadpo.optimizer.schedule import LearningRate
from megadpo.reference import NoReference, OffloadedReference, Reference, ResidentReference
from megadpo.reference.key import CacheKey, cache_key, sampled_fingerprint
from megadpo.runtime.collectives import gather_rows, on_every
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger
from megadpo.train.first_step import NoPreference
from megadpo.train.trainer import LoopSettings

logger = get_logger(__name__)

_REFERENCES = {ReferenceMode.resident: ResidentReference, ReferenceMode.offload: OffloadedReference}

# How far the first loss may be from its value without preference. A live reference runs on the policy's schedule, so
# that only the mean rounds; cached log-probs were computed in another packing, or in another layout.
_LIVE_TOLERANCE, _CACHED_TOLERANCE, _CACHED_AND_ROUNDED_TOLERANCE = 1e-6, 1e-5, 1e-3


def check_weight_files(config: Config, source: ModelSource, arch: Architecture) -> None:
    """Raises ConversionError where a model's files don't hold it, going by their headers; for one rank, no collectives.

    ConfigError for a reference that can't follow the policy. Takes no time, so that it can come before the data is
    tokenized.
    """
    if source.checkpoint is None:
        check_hf_weights(arch, source.hf_dir)
    own = config.reference.hf_path
    if own is not None:
        check_hf_weights(read_architecture(own), own)
    if config.reference.sync_every is not None and reference_architecture(config, arch) != arch:
        raise ConfigError(
            f"reference.sync_every={config.reference.sync_every}: mixes the policy's weights into the reference's, "
            f"reference.hf_path={own} is of another architecture: drop one of the two"
        )


def batch_shape(state: ParallelState, *, sequence_parallel: bool, fp8_recipe: str | None = None) -> BatchShape:
    """What the layout and an FP8 recipe ask of a batch."""
    return BatchShape(
        data_rank=state.data_rank,
        data_size=state.data_size,
        token_multiple=token_multiple(
            fp8_recipe, tensor=state.tensor_size, context=1, sequence_parallel=sequence_parallel
        ),
        fixed_streams=state.pipeline_size > 1,
        microbatch_multiple=state.pipeline_size if state.virtual_pipeline_size > 1 else 1,
    )


def build_batches(config: Config, arch: Architecture, state: ParallelState, pad_token_id: int) -> BatchBuilder:
    """What turns pairs into this rank's microbatches."""
    return BatchBuilder(
        shape=batch_shape(
            state, sequence_parallel=bool(config.parallel.sequence_parallel), fp8_recipe=config.precision.fp8
        ),
        tokens_per_microbatch=config.data.tokens_per_microbatch,
        pad_token_id=pad_token_id,
        share_prompt=config.data.share_prompt,
        flop_rates=arch.flop_rates,
        reference_flop_rates=reference_architecture(config, arch).flop_rates if config.reference.mode in LIVE else None,
    )


def reference_architecture(config: Config, arch: Architecture) -> Architecture:
    """That of the reference's own directory, or the policy's."""
    own = config.reference.hf_path
    return arch if own is None else read_architecture(own)


def build_reference(
    config: Config, source: ModelSource, arch: Architecture, state: ParallelState, device: Device
) -> Reference:
    """The reference that computes while the policy trains, or that there is none; not a cached one."""
    if config.reference.mode == ReferenceMode.none:
        return NoReference(is_last_stage=state.is_last_stage, device=device.torch_device)
    chunks = load_reference_model(config, source, arch, state, device)
    return _REFERENCES[config.reference.mode](chunks, device=device.torch_device)


def load_reference_model(
    config: Config, source: ModelSource, arch: Architecture, state: ParallelState, device: Device
) -> list[PolicyModel]:
    """This rank's chunks of the reference: its own directory's weights, or the starting policy's."""
    own = config.reference.hf_path
    if own is None:
        return load_starting_model(config, source, arch, state, device)
    own_arch = read_architecture(own)
    chunks = load_model(own_arch, state, own, model_options(config, own_arch, device))
    _check_quantised(chunks, config, state, device)
    return chunks


def weight_files(source: ModelSource) -> list[Path]:
    """The files that a model's weights are read from. ConversionError where the directory has none."""
    if source.checkpoint is None:
        return hf_weight_files(source.hf_dir)
    return sorted(path for pattern in ("*.distcp", ".metadata") for path in source.checkpoint.glob(pattern))


def reference_key(config: Config, source: ModelSource, *, trust_index: bool = True) -> CacheKey:
    """What the reference's log-probs depend on; reads weight files whose hash is not known yet. For one process.

    Without `trust_index` it reads all of them.
    """
    reference = _reference_source(config, source)
    fp8 = fp8_settings(config)
    return cache_key(
        weight_files=weight_files(reference),
        config_file=reference.hf_dir / "config.json",
        tokenizer_dir=source.hf_dir,
        precision=str(config.precision.dtype) if fp8 is None else f"{config.precision.dtype}, {fp8}",
        index_dir=Path(str(config.reference.cache_dir)) if trust_index else None,
    )


def reference_fingerprint(config: Config, source: ModelSource) -> str:
    """What tells the reference's files from others, "" without a reference; for one process."""
    if config.reference.mode == ReferenceMode.none:
        return ""
    return sampled_fingerprint(weight_files(_reference_source(config, source)))


def _reference_source(config: Config, source: ModelSource) -> ModelSource:
    own = config.reference.hf_path
    return source if own is None else ModelSource(Path(own), checkpoint=None)


def load_starting_model(
    config: Config,
    source: ModelSource,
    arch: Architecture,
    state: ParallelState,
    device: Device,
    *,
    trained: bool = False,
) -> list[PolicyModel]:
    """This rank's chunks of the model with the weights that a run starts from, in the configured precision."""
    options = model_options(config, arch, device, trained=trained)
    if source.checkpoint is None:
        chunks = load_model(arch, state, source.hf_dir, options)
    else:
        if (stored_dtype(source.checkpoint), config.precision.dtype) == (Dtype.fp32, Dtype.bf16):
            logger.warning("%s: the weights are stored as fp32 and are rounded to bf16", source.checkpoint)
        chunks = build_model(arch, state, options)
        load_weights(source.checkpoint, chunks, vocab_size=arch.vocab_size)
    _check_quantised(chunks, config, state, device)
    return chunks


def build_policy(
    config: Config,
    source: ModelSource,
    arch: Architecture,
    state: ParallelState,
    device: Device,
    checkpoint: Path | None,
) -> Policy:
    """The policy with a checkpoint's weights and optimizer state, or with the weights that the run starts from."""
    if checkpoint is None:
        modules = load_starting_model(config, source, arch, state, device, trained=True)
    else:
        modules = build_model(arch, state, model_options(config, arch, device, trained=True))
        _check_quantised(modules, config, state, device)
    modules[-1].token_statistics = config.train.log_token_statistics
    chunks = wrap_data_parallel(modules, data_parallel_options(config, state))
    optimizer = build_optimizer(
        chunks,
        dtype=torch_dtype(config),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip_grad=config.optimizer.clip_grad,
        options=optimizer_options(config),
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, chunks, optimizer)
        logger.info("resumed from %s", checkpoint)
    return Policy(modules, chunks, optimizer)


def _check_quantised(chunks: Sequence[PolicyModel], config: Config, state: ParallelState, device: Device) -> None:
    """Says how many of a model's linear layers compute in FP8; ConfigError where it's not those that should.

    Collective over all ranks, which raise together.
    """
    fp8 = fp8_settings(config)
    if fp8 is None:
        return
    counts = on_every(lambda: count_quantised(chunks, fp8))
    rows = gather_rows(torch.tensor(counts, device=device.torch_device))
    quantised, linears = (rows.sum(dim=0) // (state.tensor_size * state.data_size)).tolist()
    logger.info("fp8: %d of the model's %d linear layers are quantised", quantised, linears)


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


def refers_to_start(config: Config) -> bool:
    """Whether the reference has the weights that the policy starts with."""
    own, start = config.reference.hf_path, config.model.hf_path
    return own is None or (start is not None and Path(own).samefile(start))


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
