"""The inputs of a plan: a model, a layout, memory options, the pairs of a step, the machines."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megadpo.data.batch import stream_tokens
from megadpo.data.loader import BatchShape
from megadpo.models.fp8_recipes import token_multiple
from megadpo.models.hf_config import Architecture
from megadpo.models.options import PipelineSplit, Recompute
from megadpo.optimizer.build import OptimizerOptions
from megadpo.runtime.gpus import Gpu


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The parallel layout; `virtual_pipeline` is the number of model chunks of a stage."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    split: PipelineSplit = field(default_factory=PipelineSplit)

    @property
    def world_size(self) -> int:
        """Number of ranks of the layout."""
        return self.tensor * self.pipeline * self.data

    @property
    def sequence_ranks(self) -> int:
        """Number of ranks that share the rows of a stream between the layers' matrix products."""
        return self.tensor if self.sequence_parallel else 1

    def __str__(self) -> str:
        virtual = f" x vpp{self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        split = f" ({self.split})" if str(self.split) else ""
        return f"tp{self.tensor} x pp{self.pipeline}{virtual} x dp{self.data}{split}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryKnobs:
    """Settings that change the memory per parameter or token, but not the layout.

    `fp8` is a recipe of Transformer Engine's, except in (first, last) `layers_in_bf16`. Streams are padded to
    the multiple of the recipe `padded_for`, which may also be an emulated one. `reference` is the reference's mode.
    """

    recompute: Recompute = field(default_factory=Recompute)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    grad_reduce_in_fp32: bool = True
    fp8: str | None = None
    layers_in_bf16: tuple[int, int] = (0, 0)
    padded_for: str | None = None
    reference: str = "resident"

    @property
    def runs_reference(self) -> bool:
        """True if a step has a pass of the reference."""
        return self.reference in ("resident", "offload")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The machines: the data of one GPU (None: unknown), and the memory to plan for (None: not judged)."""

    gpu_name: str | None = None
    gpu: Gpu | None = None
    memory_gib: float | None = None
    gpus_per_node: int = 8
    network_gb_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class PairLengths:
    """Numbers of tokens of a pair's prompt and its responses."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All inputs of a plan.

    `steps` are the pairs of each step to plan, `lengths_from` names the origin of their lengths. The longest pair of
    the data needs a stream of `longest_pair` tokens. `attention` is the kernel whose memory is counted.
    """

    name: str
    arch: Architecture
    reference: Architecture
    layout: Layout
    knobs: MemoryKnobs
    cluster: Cluster
    dtype: torch.dtype
    steps: tuple[tuple[PairLengths, ...], ...]
    longest_pair: int
    lengths_from: str
    share_prompt: bool
    tokens_per_microbatch: int
    logits_mib: int
    attention: str = "varlen"

    @property
    def fp8_share(self) -> float:
        """Share of the layers that are quantised."""
        return 0.0 if self.knobs.fp8 is None else 1 - sum(self.knobs.layers_in_bf16) / self.arch.num_layers

    def stream_tokens(self, pair: PairLengths) -> int:
        """Number of tokens of a pair in a stream."""
        return stream_tokens(pair.prompt, pair.chosen, pair.rejected, share_prompt=self.share_prompt)

    @property
    def batch_shape(self) -> BatchShape:
        """Requirements of layout and FP8 recipe on a batch, for data-parallel rank 0."""
        layout = self.layout
        return BatchShape(
            data_rank=0,
            data_size=layout.data,
            token_multiple=token_multiple(
                self.knobs.padded_for, tensor=layout.tensor, context=1, sequence_parallel=layout.sequence_parallel
            ),
            fixed_streams=layout.pipeline > 1,
            microbatch_multiple=layout.pipeline if layout.virtual_pipeline > 1 else 1,
        )

    @property
    def longest_stream(self) -> int:
        """Number of tokens of the longest pair."""
        return max(self.longest_pair, *(self.stream_tokens(pair) for step in self.steps for pair in step))

    @property
    def widest_stream(self) -> int:
        """Number of tokens of the longest possible stream of a step, for which memory is planned.

        It is a full budget, or a longer pair; less if all pairs of a step do not fill the budget.
        """
        whole_steps = (sum(self.stream_tokens(pair) for pair in step) for step in self.steps)
        widest = max(self.longest_stream, min(self.tokens_per_microbatch, max(whole_steps)))
        multiple = self.batch_shape.token_multiple
        return -(-widest // multiple) * multiple
