"""Megatron's distributed AdamW over this rank's model chunks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    Adam,
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from megadpo.optimizer.host_offload import HostOptimizer
from megadpo.optimizer.sliced_state import SlicedOptimizer
from megadpo.runtime.device import Device

_FUSED_ADAM_ARGUMENTS = ("master_weight_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "use_decoupled_grad")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataParallelOptions:
    """Options of the communication between data-parallel ranks; overlapping does not change results.

    `bucket_size` is in parameters, None for Megatron's default; without `overlap_grad_reduce` there is one bucket.
    """

    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None
    grad_reduce_in_fp32: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerOptions:
    """Options of the optimizer's states: their location and their formats.

    `precision_aware`: Transformer Engine's FusedAdam with moments in `exp_avg_dtype` and `exp_avg_sq_dtype` (uint8 is
    fp8). `offload_fraction` of the parameters is updated on the host, with all states in fp32.
    """

    precision_aware: bool = False
    exp_avg_dtype: torch.dtype = torch.float32
    exp_avg_sq_dtype: torch.dtype = torch.float32
    offload_fraction: float = 0.0
    overlap_offload_copies: bool = False


def why_not_fused_adam(device: Device, *, with_formats: bool) -> str | None:
    """The reason why the device or the installation lacks an optimizer of OptimizerOptions; None if nothing is lacking.

    One on the host needs Transformer Engine too: Megatron (0.16) compares its version, and fails without one.
    `with_formats`: moments have formats of their own.
    """
    if device.kind != "cuda":
        return "CUDA"
    if not distrib_optimizer.USING_TE_OPTIMIZER:
        return "Transformer Engine, for its FusedAdam (NGC's PyTorch images hold it)"
    if not with_formats:
        return None
    known = inspect.signature(distrib_optimizer.Adam).parameters
    lacks = [name for name in _FUSED_ADAM_ARGUMENTS if name not in known]
    return f"a newer Transformer Engine: its FusedAdam does not know {', '.join(lacks)}" if lacks else None


@dataclass(frozen=True, slots=True)
class Policy:
    """The model being trained: its chunks, the same chunks inside Megatron's DDP, and their optimizer."""

    modules: list[MegatronModule]
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer


def wrap_data_parallel(
    chunks: Sequence[MegatronModule], options: DataParallelOptions = DataParallelOptions()
) -> list[DistributedDataParallel]:
    """Wraps the chunks in Megatron's DDP: contiguous gradient buffers, reduced over the data-parallel group."""
    # Interleaved chunks wait for each other's microbatches; meanwhile the next chunk's weights can be gathered.
    align_param_gather = options.overlap_param_gather and len(chunks) > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.grad_reduce_in_fp32,
        use_distributed_optimizer=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        align_param_gather=align_param_gather,
        bucket_size=options.bucket_size,
    )
    config = chunks[0].config
    wrapped = [
        # Other chunks compute while a later one's gradients are sent, so it needs no buckets to overlap with itself.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=options.overlap_grad_reduce and index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if options.overlap_grad_reduce:
        # Only the last microbatch's gradients are sent; after the first stage, when a chunk's gradients are complete.
        config.no_sync_func = _one_or_list([chunk.no_sync for chunk in wrapped])
        config.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in wrapped])
    if align_param_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
    return wrapped


def _one_or_list(functions: list[Callable[..., Any]]) -> Any:
    """Returns the only chunk's function, or a list of all chunks', as Megatron's schedules expect."""
    return functions[0] if len(functions) == 1 else functions


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gathers all weights of the last update, which Megatron otherwise postpones to the next forward pass.

    To be called before weights are read other than by the chunks' forward. Collective over the data group.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    *,
    dtype: torch.dtype,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_grad: float,
    options: OptimizerOptions = OptimizerOptions(),
) -> MegatronOptimizer:
    """Builds AdamW with its state sharded over the data-parallel ranks, and fp32 main weights if the model is bf16."""
    offloads = options.offload_fraction > 0
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=0.0,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        clip_grad=clip_grad or math.inf,  # without clipping Megatron would not compute the norm that is logged
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        # The optimizer on the host takes gradients and weights in the same way as the precision-aware one.
        use_precision_aware_optimizer=options.precision_aware or offloads,
        exp_avg_dtype=options.exp_avg_dtype,
        exp_avg_sq_dtype=options.exp_avg_sq_dtype,
        # If main weights were stored as remainders of bf16 weights, no other optimizer could read the checkpoint.
        store_param_remainders=False,
        optimizer_cpu_offload=offloads,
        optimizer_offload_fraction=options.offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=options.overlap_offload_copies,
    )
    optimizer = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    for member in distributed_optimizers(optimizer):
        member.__class__ = SlicedOptimizer  # here and below: adds methods only
        if offloads:
            member.optimizer.__class__ = HostOptimizer
    return optimizer


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers inside Megatron's wrapper."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def adam_package() -> str:
    """The package whose Adam Megatron has imported: transformer_engine, apex or torch."""
    return str(Adam.__module__).partition(".")[0]


def set_hyperparameters(
    optimizer: MegatronOptimizer, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> None:
    """Sets this step's hyperparameters in every parameter group; norms and biases (`wd_mult` 0) do not decay.

    Without its own scheduler Megatron leaves `weight_decay` at its global value, and a loaded checkpoint has the values
    of the run that wrote it. So they are set before every update, from the configuration of this run.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]
        group["betas"] = betas
        group["eps"] = eps
