"""Megatron's distributed AdamW over this rank's model chunks, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import Adam, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate of every step, as a function of the number of updates done before it (TRL's convention)."""

    peak: float
    minimum: float
    schedule: str
    warmup_steps: int
    total_steps: int

    def after(self, steps_done: int) -> float:
        """Learning rate of the update that follows `steps_done` others.

        Linear warm-up from 0 over `warmup_steps`, then constant, linear or cosine decay to `minimum` at `total_steps`.
        """
        if steps_done < self.warmup_steps:
            return self.peak * steps_done / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        progress = (steps_done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        remaining = 1.0 - min(1.0, progress)
        if self.schedule == "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * (1.0 - remaining)))
        return self.minimum + (self.peak - self.minimum) * remaining


@dataclass(frozen=True, slots=True)
class Policy:
    """The model being trained: its chunks, the same chunks inside Megatron's DDP, and their optimizer."""

    modules: list[MegatronModule]
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer


def wrap_data_parallel(chunks: Sequence[MegatronModule]) -> list[DistributedDataParallel]:
    """The chunks inside Megatron's DDP: contiguous gradient buffers in fp32, reduced over the data-parallel group."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False, bucket_size=None
    )
    config = chunks[0].config
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    for chunk in wrapped:
        _count_padding_between_buckets(chunk)
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def _count_padding_between_buckets(chunk: DistributedDataParallel) -> None:
    """Makes a gathered optimizer state as long as Megatron's index of it, so that checkpoints hold the right numbers.

    Megatron (0.16) finds a parameter in the gathered state by its place in the whole buffer, padding included, but
    leaves each bucket's padding out when it gathers. Everything behind a padded bucket is then shifted. Without overlap
    there is one bucket, except where a tied embedding meets a pipeline: it always has a bucket of its own. To go when
    the two agree; with one bucket, or none padded, this changes nothing.
    """
    for buffer in chunk.buffers:
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    *,
    dtype: torch.dtype,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_grad: float,
) -> MegatronOptimizer:
    """AdamW with its state sharded over the data-parallel ranks; fp32 main weights when the model is bf16."""
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
    )
    return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)


def adam_package() -> str:
    """The package whose Adam Megatron found when it was imported: transformer_engine, apex or torch."""
    return str(Adam.__module__).partition(".")[0]


def set_hyperparameters(
    optimizer: MegatronOptimizer, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> None:
    """Writes this step's hyperparameters into every parameter group; norms and biases (`wd_mult` 0) do not decay.

    Megatron leaves `weight_decay` at its global value without its own scheduler, and a loaded checkpoint brings the
    values of the run that wrote it: the configuration of this run is the only truth, so it is set before every update.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]
        group["betas"] = betas
        group["eps"] = eps
