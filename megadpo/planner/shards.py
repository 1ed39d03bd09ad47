"""The real shards of a model, as Megatron builds them for a rank of each pipeline stage, on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megadpo.models.builder import build_model, is_split
from megadpo.models.hf_config import Architecture
from megadpo.models.options import ModelOptions, PipelineSplit, Recompute
from megadpo.models.policy import PolicyModel
from megadpo.optimizer.build import wrap_data_parallel
from megadpo.planner.job import Job, Layout
from megadpo.runtime.device import planning_device
from megadpo.runtime.parallel_state import ParallelState, simulated_parallel_state


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The part of the policy on a rank of one stage.

    `layers` counts those of each model chunk. `parameters` counts the rank's, `model_parameters` those of the Hugging
    Face model on all tensor ranks of the stage, without padding of the vocabulary and a second copy of tied embeddings.
    `linear_parameters` counts those of the layers' matrices, to which FP8 applies. `buffer_parameters` includes
    Megatron's padding of its gradient buffers.
    """

    layers: tuple[int, ...]
    parameters: int
    model_parameters: int
    linear_parameters: int
    buffer_parameters: int


def build_shard(job: Job, arch: Architecture, stage: int) -> Shard:
    """Counts the shard of one stage's ranks in the modules that Megatron builds for it; inside `megatron_device`."""
    layout = job.layout
    with (
        simulated_parallel_state(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            data=layout.data,
            stage=stage,
        ) as state,
        torch.device("meta"),
    ):
        chunks = build_model(arch, state, model_options(job, recompute=job.knobs.recompute, split=layout.split))
        buffers = [buffer for wrapped in wrap_data_parallel(chunks) for buffer in wrapped.buffers]
    return Shard(
        layers=tuple(len(chunk.decoder.layers) for chunk in chunks),
        parameters=sum(weight.numel() for chunk in chunks for weight in chunk.parameters()),
        model_parameters=_model_parameters(chunks, arch, layout, state),
        linear_parameters=sum(
            weight.numel() for chunk in chunks for weight in chunk.decoder.parameters() if weight.dim() == 2
        ),
        buffer_parameters=sum(buffer.grad_data.numel() for buffer in buffers),
    )


def model_options(job: Job, *, recompute: Recompute, split: PipelineSplit) -> ModelOptions:
    """Options of the models in a plan: Megatron's own layers, whose parameters are those of Transformer Engine's."""
    return ModelOptions(
        device=planning_device(),
        dtype=job.dtype,
        sequence_parallel=job.layout.sequence_parallel,
        attention=job.attention,
        logits_mib=job.logits_mib,
        recompute=recompute,
        split=split,
    )


def _model_parameters(chunks: Sequence[PolicyModel], arch: Architecture, layout: Layout, state: ParallelState) -> int:
    """Number of parameters of the Hugging Face model that the tensor ranks of a stage hold together."""
    padding = (arch.padded_vocab_size(layout.tensor) - arch.vocab_size) * arch.hidden_size
    total = 0
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            is_table = name in ("embedding.word_embeddings.weight", "output_layer.weight")
            is_copy = name == "output_layer.weight" and arch.tied_embeddings and not chunk.pre_process
            if is_copy:
                continue
            total += weight.numel() * (layout.tensor if is_split(weight) else 1) - padding * is_table
    return total
