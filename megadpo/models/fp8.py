"""Settings of FP8 layers, and their requirements on the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from megadpo.models.backend import why_not_transformer_engine
from megadpo.models.fp8_recipes import feature_multiple
from megadpo.runtime.device import Device

if TYPE_CHECKING:
    from megadpo.models.hf_config import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8:
    """Settings of quantised linear layers, computed by Transformer Engine's kernels or in emulation.

    `format` is 'hybrid' (gradients in e5m2) or 'e4m3'. Some of the first and last layers may stay in bf16. The amax
    settings only matter for the recipe 'delayed'.
    """

    recipe: str
    format: str
    emulated: bool
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    amax_history_len: int = 1
    amax_compute_algo: str = "most_recent"

    def covers(self, layer: int, num_layers: int) -> bool:
        """True if the layer, counted from 0 over the whole model, is quantised."""
        return self.num_layers_at_start_in_bf16 <= layer < num_layers - self.num_layers_at_end_in_bf16

    def megatron_fields(self) -> dict[str, Any]:
        """The fields of Megatron's configuration; none in emulation, which Megatron does not know."""
        if self.emulated:
            return {}
        some_in_bf16 = self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16 > 0
        return {
            "fp8": self.format,
            "fp8_recipe": self.recipe,
            "fp8_amax_history_len": self.amax_history_len,
            "fp8_amax_compute_algo": self.amax_compute_algo,
            "tp_only_amax_red": True,  # data-parallel ranks have different pairs, and their own scales
            "first_last_layers_bf16": some_in_bf16,
            "num_layers_at_start_in_bf16": self.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": self.num_layers_at_end_in_bf16,
        }


def why_not_fp8(fp8: Fp8, device: Device, dtype: torch.dtype) -> str | None:
    """The reason why FP8 can't be used on this machine, as a clause; None if it can.

    Without Transformer Engine, Megatron would silently train without FP8. Emulation runs everywhere.
    """
    if fp8.emulated:
        return None
    return (
        why_not_transformer_engine(device, dtype)
        or why_not_gpu(fp8.recipe, device.compute_capability())
        or _why_not_cuda(fp8.recipe, torch.version.cuda)
    )


def why_not_gpu(recipe: str, capability: tuple[int, int]) -> str | None:
    """The reason why a GPU of this compute capability can't run a recipe of Transformer Engine, as a clause."""
    shown = ".".join(map(str, capability))
    if recipe == "mxfp8" and capability[0] != 10:
        return f"needs a Blackwell card (compute capability 10.x), this one has {shown}"
    if recipe == "blockwise" and capability != (9, 0):
        return f"needs a Hopper card (compute capability 9.0), this one has {shown}"
    if capability < (8, 9):
        return f"needs a card with FP8 (compute capability 8.9 or newer), this one has {shown}"
    return None


def _why_not_cuda(recipe: str, cuda: str | None) -> str | None:
    if recipe == "blockwise" and (cuda is None or Version(cuda) < Version("12.9")):
        return f"needs torch for CUDA 12.9 or newer, this one is for {cuda}"
    return None


def unaligned_features(arch: Architecture, recipe: str, *, tensor: int) -> str | None:
    """Sizes of a tensor rank's quantised matrices that the recipe's kernels don't take, as a clause; None if none."""
    all_heads = arch.num_attention_heads + 2 * arch.num_query_groups
    sizes = {
        "hidden size": arch.hidden_size,
        "query features": arch.num_attention_heads * arch.head_dim // tensor,
        # Megatron splits them evenly, and gathers key-value heads if there are fewer than ranks.
        "query, key and value features": all_heads * arch.head_dim // tensor,
        "feed-forward features": arch.ffn_hidden_size // tensor,
    }
    multiple = feature_multiple(recipe)
    unfit = [f"{name} {size}" for name, size in sizes.items() if size % multiple]
    return f"needs multiples of {multiple}, a tensor rank's are: {', '.join(unfit)}" if unfit else None
