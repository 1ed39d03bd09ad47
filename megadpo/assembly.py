"""Builds the pieces of a run from its Config: reference, policy, loss. Configuration objects stop here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megadpo.checkpoint import load_checkpoint, load_weights
from megadpo.checkpoint_files import stored_dtype
from megadpo.compute import data_parallel_options, fp8_settings, model_options, optimizer_options, torch_dtype
from megadpo.config.choices import Dtype, ReferenceMode
from megadpo.config.schema import Config
from megadpo.data.loader import BatchBuilder, BatchShape
from megadpo.device import Device
from megadpo.fp8_recipes import token_multiple
from megadpo.losses import PreferenceLoss
from megadpo.model_source import ModelSource
from megadpo.models.builder import build_model, load_model
from megadpo.models.conversion.load_save import check_hf_weights
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.models.policy import PolicyModel
from megadpo.models.quantised import count_quantised
from megadpo.optimizer import LearningRate, Policy, build_optimizer, wrap_data_parallel
from megadpo.parallel.collectives import gather_rows, on_every
from megadpo.parallel.state import ParallelState
from megadpo.rank_logging import get_logger
from megadpo.reference import Reference, ResidentReference
from megadpo.trainer import LoopSettings

logger = get_logger(__name__)

_REFERENCES = {ReferenceMode.resident: ResidentReference}


def check_weight_files(config: Config, source: ModelSource, arch: Architecture) -> None:
    """Raises ConversionError where a model's files don't hold it, going by their headers; for one rank, no collectives.

    Takes no time, so that it can come before the data is tokenized.
    """
    if source.checkpoint is None:
        check_hf_weights(arch, source.hf_dir)
    if config.reference.hf_path is not None:
        check_hf_weights(read_architecture(config.reference.hf_path), config.reference.hf_path)


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
    own_reference = config.reference.hf_path
    return BatchBuilder(
        shape=batch_shape(
            state, sequence_parallel=bool(config.parallel.sequence_parallel), fp8_recipe=config.precision.fp8
        ),
        tokens_per_microbatch=config.data.tokens_per_microbatch,
        pad_token_id=pad_token_id,
        share_prompt=config.data.share_prompt,
        flop_rates=arch.flop_rates,
        reference_flop_rates=(arch if own_reference is None else read_architecture(own_reference)).flop_rates,
    )


def build_reference(
    config: Config, source: ModelSource, arch: Architecture, state: ParallelState, device: Device
) -> Reference:
    """The frozen reference: its own directory's weights, or the starting policy's."""
    own = config.reference.hf_path
    if own is None:
        chunks = load_starting_model(config, source, arch, state, device)
    else:
        own_arch = read_architecture(own)
        chunks = load_model(own_arch, state, own, model_options(config, own_arch, device))
        _check_quantised(chunks, config, state, device)
    return _REFERENCES[config.reference.mode](chunks, device=device.torch_device)


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
    own = config.reference.hf_path
    start = config.model.hf_path
    reference_is_start = own is None or (start is not None and Path(own).samefile(start))
    return LoopSettings(
        total_steps=total_steps,
        log_every=config.train.log_every,
        eval_every=config.train.eval_every,
        save_every=config.train.save_every,
        check_every=config.precision.fp8_check_every,
        learning_rate=LearningRate(
            peak=config.optimizer.lr,
            minimum=config.optimizer.min_lr,
            schedule=str(config.optimizer.schedule),
            warmup_steps=config.optimizer.warmup_steps,
            total_steps=total_steps,
        ),
        value_without_preference=loss.value_without_preference if reference_is_start else None,
        peak_flops=device.peak_flops(torch_dtype(config)),
    )
