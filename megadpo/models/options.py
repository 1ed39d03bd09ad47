"""What a model is built with besides its architecture and its place in the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megadpo.models.fp8 import Fp8
from megadpo.runtime.device import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """Which activations the backward computes again, in Megatron's words; by default none.

    `modules` (of core_attn and mlp) belongs to granularity "selective". With "full" and method "uniform" every group of
    `num_layers` keeps its input alone.
    """

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ()

    @property
    def is_block(self) -> bool:
        """Whether `num_layers` single layers of each chunk keep their input alone, and the others everything."""
        return self.granularity == "full" and self.method == "block"

    def __str__(self) -> str:
        if self.granularity == "selective":
            return f"selective ({', '.join(self.modules)})"
        if self.granularity == "full":
            return f"full ({self.method}, {self.num_layers})"
        return "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSplit:
    """Layers of the outer pipeline stages where they are not as many as the others'."""

    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        ends = {"first": self.first, "last": self.last}
        return ", ".join(f"{layers} layers in the {end} stage" for end, layers in ends.items() if layers is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Settings of a model's construction; of those with a default only `fp8` changes the numbers, by its rounding.

    `backend` is what `choose_backend` says and `attention` what `choose_attention` says; by default what serves
    everywhere. The head makes logits within `logits_mib` at a time.
    """

    device: Device
    dtype: torch.dtype
    sequence_parallel: bool
    backend: str = "native"
    attention: str = "sdpa"
    logits_mib: int = 128
    recompute: Recompute = Recompute()
    split: PipelineSplit = PipelineSplit()
    fp8: Fp8 | None = None
