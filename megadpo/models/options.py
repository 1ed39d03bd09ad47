"""Options of building a model, besides its architecture and the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megadpo.models.fp8 import Fp8
from megadpo.runtime.device import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """Activation recomputation, in Megatron's terms; by default none.

    `modules` (of core_attn and mlp) belongs to granularity "selective". With "full" and method "uniform" only the input
    of every group of `num_layers` layers is saved.
    """

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ()

    @property
    def is_block(self) -> bool:
        """True if `num_layers` layers of each chunk save only their input, and the others all activations."""
        return self.granularity == "full" and self.method == "block"

    def __str__(self) -> str:
        if self.granularity == "selective":
            return f"selective ({', '.join(self.modules)})"
        if self.granularity == "full":
            return f"full ({self.method}, {self.num_layers})"
        return "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSplit:
    """Numbers of layers in the first and last pipeline stage, where they differ from the others'."""

    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        ends = {"first": self.first, "last": self.last}
        return ", ".join(f"{layers} layers in the {end} stage" for end, layers in ends.items() if layers is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Options of building a model; of those with a default only `fp8` changes the results, by its rounding.

    `backend` comes from `choose_backend` and `attention` from `choose_attention`; the defaults work everywhere. The
    head computes logits in chunks of at most `logits_mib`.
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
