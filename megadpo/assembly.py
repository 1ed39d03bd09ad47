"""Builds the pieces of a run from its Config: reference, policy, loss. Configuration objects stop here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megadpo.checkpoint import load_checkpoint, load_weights
from megadpo.checkpoint_files import stored_dtype
from megadpo.config.schema import AttentionKernel, Backend, Config, Dtype, MomentDtype, ReferenceMode
from megadpo.data.loader import BatchBuilder, BatchShape
from megadpo.device import Device
from megadpo.errors import ConfigError
from megadpo.losses import PreferenceLoss
from megadpo.model_source import ModelSource
from megadpo.models.backend import choose_backend, transformer_engine_version, why_not_transformer_engine
from megadpo.models.builder import build_model, fuses_weight_gradients, load_model
from megadpo.models.conversion.load_save import check_hf_weights
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.models.kernels import choose_attention
from megadpo.models.options import ModelOptions, PipelineSplit, Recompute
from megadpo.models.policy import PolicyModel
from megadpo.models.varlen import why_not_varlen
from megadpo.optimizer import (
    DataParallelOptions,
    LearningRate,
    OptimizerOptions,
    Policy,
    adam_package,
    build_optimizer,
    why_not_fused_adam,
    wrap_data_parallel,
)
from megadpo.parallel.state import ParallelState
from megadpo.rank_logging import get_logger
from megadpo.reference import Reference, ResidentReference
from megadpo.trainer import LoopSettings

logger = get_logger(__name__)


_REFERENCES = {ReferenceMode.resident: ResidentReference}
TORCH_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}
_MOMENT_DTYPES = {
    MomentDtype.fp32: torch.float32,
    MomentDtype.bf16: torch.bfloat16,
    MomentDtype.fp16: torch.float16,
    MomentDtype.fp8: torch.uint8,
}


def torch_dtype(config: Config) -> torch.dtype:
    """Number format of weights and activations."""
    return TORCH_DTYPES[config.precision.dtype]


def check_weight_files(config: Config, source: ModelSource, arch: Architecture) -> None:
    """Raises ConversionError where a model's files don't hold it, going by their headers; for one rank, no collectives.

    Takes no time, so that it can come before the data is tokenized.
    """
    if source.checkpoint is None:
        check_hf_weights(arch, source.hf_dir)
    if config.reference.hf_path is not None:
        check_hf_weights(read_architecture(config.reference.hf_path), config.reference.hf_path)


def log_attention(config: Config, arch: Architecture, device: Device) -> None:
    """Says which kernel serves the model's attention, and why not the faster one; ConfigError as `choose_attention`."""
    kernel = _attention(config, arch, device)
    lacks = why_not_varlen(device, torch_dtype(config), arch.head_dim)
    asked = config.device.attention != AttentionKernel.auto
    logger.info("attention: %s%s", kernel, "" if asked or lacks is None else f" (varlen: {lacks})")


def settle_backend(config: Config, device: Device) -> Config:
    """A copy that says which layers models will be made of here; ConfigError as `choose_backend`."""
    chosen = choose_backend(str(config.precision.backend), device=device, dtype=torch_dtype(config))
    return replace(config, precision=replace(config.precision, backend=Backend(chosen)))


def log_backend(config: Config, device: Device) -> None:
    """Says what the layers are made of and why not of the faster ones, and what Megatron found for the update."""
    backend = config.precision.backend
    if backend == Backend.transformer_engine:
        layers = f"transformer_engine {transformer_engine_version()}"
    else:
        lacks = why_not_transformer_engine(device, torch_dtype(config)) if device.kind == "cuda" else None
        layers = "native" if lacks is None else f"native (transformer_engine: {lacks})"
    added = "inside" if fuses_weight_gradients(str(backend)) else "after"
    logger.info(
        "layers: %s; weight gradients are added up %s the matrix product; AdamW is %s's", layers, added, adam_package()
    )


def check_optimizer(config: Config, device: Device) -> None:
    """Raises ConfigError where the optimizer that is asked for can't work on `device` with what is installed."""
    asked = {"precision_aware": config.optimizer.precision_aware, "cpu_offload": config.optimizer.cpu_offload}
    lacks = why_not_fused_adam(device)
    problems = [f"optimizer.{key}=true: needs {lacks}: drop it" for key, is_on in asked.items() if is_on and lacks]
    if problems:
        raise ConfigError(problems)


def batch_shape(state: ParallelState, *, sequence_parallel: bool) -> BatchShape:
    """What the layout asks of a batch."""
    return BatchShape(
        data_rank=state.data_rank,
        data_size=state.data_size,
        token_multiple=state.tensor_size if sequence_parallel else 1,
        fixed_streams=state.pipeline_size > 1,
        microbatch_multiple=state.pipeline_size if state.virtual_pipeline_size > 1 else 1,
    )


def build_batches(config: Config, arch: Architecture, state: ParallelState, pad_token_id: int) -> BatchBuilder:
    """What turns pairs into this rank's microbatches."""
    own_reference = config.reference.hf_path
    return BatchBuilder(
        shape=batch_shape(state, sequence_parallel=bool(config.parallel.sequence_parallel)),
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
        chunks = load_model(own_arch, state, own, _model_options(config, own_arch, device))
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
    options = _model_options(config, arch, device, trained=trained)
    if source.checkpoint is None:
        return load_model(arch, state, source.hf_dir, options)
    stored = stored_dtype(source.checkpoint)
    if (stored, config.precision.dtype) == (Dtype.fp32, Dtype.bf16):
        logger.warning("%s: the weights are stored as fp32 and are rounded to bf16", source.checkpoint)
    chunks = build_model(arch, state, options)
    load_weights(source.checkpoint, chunks, vocab_size=arch.vocab_size)
    return chunks


def _model_options(config: Config, arch: Architecture, device: Device, *, trained: bool = False) -> ModelOptions:
    """Options of a model; only one that is trained has activations to compute again."""
    return ModelOptions(
        device=device,
        dtype=torch_dtype(config),
        sequence_parallel=bool(config.parallel.sequence_parallel),
        backend=choose_backend(str(config.precision.backend), device=device, dtype=torch_dtype(config)),
        attention=_attention(config, arch, device),
        logits_mib=config.model.logits_mib,
        recompute=recomputation(config) if trained else Recompute(),
        split=pipeline_split(config),
    )


def recomputation(config: Config) -> Recompute:
    """What the backward computes again of a model that is trained."""
    model = config.model
    return Recompute(
        granularity=None if model.recompute_granularity is None else str(model.recompute_granularity),
        method=None if model.recompute_method is None else str(model.recompute_method),
        num_layers=model.recompute_num_layers,
        modules=tuple(map(str, model.recompute_modules or ())),
    )


def pipeline_split(config: Config) -> PipelineSplit:
    """Layers of the outer pipeline stages where others are configured than the rest has."""
    parallel = config.parallel
    return PipelineSplit(
        first=parallel.num_layers_in_first_pipeline_stage, last=parallel.num_layers_in_last_pipeline_stage
    )


def data_parallel_options(config: Config, state: ParallelState) -> DataParallelOptions:
    """How gradients and weights travel; a lone data-parallel rank overlaps nothing, and says so where it was asked to.

    That is no error: the number of data-parallel ranks is no key, it follows from how many ranks were started, and a
    configuration is to run, and a run to go on, on as many as there are.
    """
    parallel = config.parallel
    if parallel.overlap_grad_reduce and state.data_size == 1:
        logger.warning(
            "parallel.overlap_grad_reduce=true has no effect: one data-parallel rank exchanges nothing (more ranks "
            "than tensor x pipeline make more of them)"
        )
        return DataParallelOptions(grad_reduce_in_fp32=parallel.grad_reduce_in_fp32)
    return DataParallelOptions(
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
        grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
    )


def optimizer_options(config: Config) -> OptimizerOptions:
    """Where the optimizer's states lie, and their formats."""
    optimizer = config.optimizer
    return OptimizerOptions(
        precision_aware=optimizer.precision_aware,
        exp_avg_dtype=_MOMENT_DTYPES[optimizer.exp_avg_dtype],
        exp_avg_sq_dtype=_MOMENT_DTYPES[optimizer.exp_avg_sq_dtype],
        offload_fraction=optimizer.offload_fraction if optimizer.cpu_offload else 0.0,
        overlap_offload_copies=optimizer.overlap_cpu_optimizer_d2h_h2d,
    )


def _attention(config: Config, arch: Architecture, device: Device) -> str:
    return choose_attention(
        str(config.device.attention), device=device, dtype=torch_dtype(config), head_dim=arch.head_dim
    )


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
        modules = build_model(arch, state, _model_options(config, arch, device, trained=True))
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


def build_loss(config: Config) -> PreferenceLoss:
    """The loss of a pair."""
    return PreferenceLoss(
        name=str(config.loss.name[0]),
        beta=config.loss.beta,
        label_smoothing=config.loss.label_smoothing,
        ipo_length_normalize=config.loss.ipo_length_normalize,
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
