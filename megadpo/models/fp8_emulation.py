"""Emulated FP8 matrix products, for studying FP8's numerics on any device.

Each operand is scaled as the recipe says, rounded to an 8-bit format and scaled back (fake quantisation), and the
product is computed in fp32. The result is the hardware's, except for the order of summation. It is slower than no FP8
and takes more memory.

Legend: T rows of the stream, K input and N output features of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megadpo.models.fp8 import Fp8
from megadpo.models.fp8_recipes import BLOCK_SIZES

_FORWARD = torch.float8_e4m3fn
_BACKWARD = {"hybrid": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}


def fake_quantize(
    matrix: torch.Tensor,
    dtype: torch.dtype,
    recipe: str,
    *,
    contracted: int,
    is_weight: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rounds a 2-D operand to an 8-bit format and returns it in fp32; its product sums over dimension `contracted`.

    `scale` is the one to use under delayed scaling; the other recipes compute theirs from the values.
    """
    values = matrix.float()
    if recipe not in BLOCK_SIZES:
        return _round_scaled(values, dtype, _scale(values.abs().amax(), dtype) if scale is None else scale)
    block = _block_shape(recipe, contracted, is_weight)
    rows, columns = values.shape
    padding = (0, -columns % block[1], 0, -rows % block[0])
    blocks = torch.nn.functional.pad(values, padding).unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    # Both block recipes use the largest power of two that keeps a block's largest value in range, at most 2**127, the
    # largest that fp32 holds.
    exponents = _scale(blocks.abs().amax(dim=(1, 3), keepdim=True), dtype).log2().floor().clamp(max=127)
    return _round_scaled(blocks, dtype, torch.exp2(exponents)).flatten(2, 3).flatten(0, 1)[:rows, :columns]


def _block_shape(recipe: str, contracted: int, is_weight: bool) -> tuple[int, int]:
    """Rows and columns of the values that share a scale."""
    size = BLOCK_SIZES[recipe]
    if recipe == "blockwise" and is_weight:
        return size, size
    return (1, size) if contracted == 1 else (size, 1)


def _scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale that maps `amax` to the largest number of the format; 1 if all values are zero.

    Finite, as in Transformer Engine: for values of 1e-36 the quotient would overflow fp32.
    """
    largest = torch.finfo(torch.float32).max
    return torch.where(amax > 0, (torch.finfo(dtype).max / amax).clamp(max=largest), torch.ones_like(amax))


def _round_scaled(values: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    return (values * scale).clamp(-largest, largest).to(dtype).float() / scale


class AmaxHistory:
    """The largest absolute values of one operand in earlier passes, from which delayed scaling computes its scale."""

    def __init__(self, length: int, algorithm: str) -> None:
        self.length = length
        self.algorithm = algorithm
        self.amaxes: list[torch.Tensor] = []

    def scale(self, dtype: torch.dtype, torch_device: torch.device) -> torch.Tensor:
        """The scale of the next pass; 1 before the first."""
        if not self.amaxes:
            return torch.ones((), device=torch_device)
        amax = torch.stack(self.amaxes).amax() if self.algorithm == "max" else self.amaxes[-1]
        return _scale(amax, dtype)

    def record(self, values: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Adds the largest of these values over the group's ranks. One all-reduce."""
        amax = values.detach().abs().amax().float()
        if group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        self.amaxes = [*self.amaxes, amax][-self.length :]


class EmulatedLinear:
    """Mixin for Megatron's parallel linear layers that emulates FP8 products; `quantised` switches it on and off.

    Bias, gathering and reduction over ranks are unchanged, in the model's own dtype.
    """

    def __init__(self, *args: Any, fp8: Fp8, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp8 = fp8
        self.quantised = True
        self.histories = {
            operand: AmaxHistory(fp8.amax_history_len, fp8.amax_compute_algo)
            for operand in (("input", "weight", "gradient") if fp8.recipe == "delayed" else ())
        }

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup,
        **options: Any,
    ) -> torch.Tensor:
        """Replaces the function with which Megatron's layers compute their product, collectives included."""
        if not self.quantised:
            options |= {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel}
            plain: torch.Tensor = super()._forward_impl(  # type: ignore[misc]
                input=input, weight=weight, bias=bias, tp_group=tp_group, **options
            )
            return plain
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        scales = {
            name: self.histories[name].scale(_FORWARD, input.device) for name in self.histories if name != "gradient"
        }
        output: torch.Tensor = _Product.apply(input, weight, self, scales)
        # As in Transformer Engine, passes without gradients use the scales and do not update them.
        if self.histories and torch.is_grad_enabled():
            self.histories["input"].record(input, self.tp_group)  # type: ignore[attr-defined]
            self.histories["weight"].record(weight, self.tp_group)  # type: ignore[attr-defined]
        return output if bias is None else output + bias

    def quantize_gradient(self, grad_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output's gradient, quantised along N for the input's gradient, and along T for the weight's."""
        dtype, recipe, scale = _BACKWARD[self.fp8.format], self.fp8.recipe, None
        if self.histories:
            scale = self.histories["gradient"].scale(dtype, grad_TN.device)
            self.histories["gradient"].record(grad_TN, self.tp_group)  # type: ignore[attr-defined]
        along_n = fake_quantize(grad_TN, dtype, recipe, contracted=1, scale=scale)
        if recipe not in BLOCK_SIZES:
            return along_n, along_n
        return along_n, fake_quantize(grad_TN, dtype, recipe, contracted=0)


def amax_history_restorer(chunks: Sequence[torch.nn.Module]) -> Callable[[], None]:
    """Returns a function that sets the amax histories of all emulated layers back to what they are now."""
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, EmulatedLinear)]
    kept = [(history, history.amaxes) for layer in layers for history in layer.histories.values()]

    def set_back() -> None:
        for history, amaxes in kept:
            history.amaxes = amaxes

    return set_back


class EmulatedColumnParallelLinear(EmulatedLinear, ColumnParallelLinear):
    """Megatron's column-parallel linear layer with emulated FP8 products."""


class EmulatedRowParallelLinear(EmulatedLinear, RowParallelLinear):
    """Megatron's row-parallel linear layer with emulated FP8 products."""


class _Product(torch.autograd.Function):
    """input · weightᵀ of quantised operands; each of its three products quantises along the dimension it sums over."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight_NK: torch.Tensor, layer: EmulatedLinear, scales: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight_NK)
        ctx.layer, ctx.scales = layer, scales
        recipe = layer.fp8.recipe
        input_TK = fake_quantize(input.flatten(0, -2), _FORWARD, recipe, contracted=1, scale=scales.get("input"))
        weight = fake_quantize(weight_NK, _FORWARD, recipe, contracted=1, is_weight=True, scale=scales.get("weight"))
        return (input_TK @ weight.t()).to(input.dtype).unflatten(0, input.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight_NK = ctx.saved_tensors
        recipe, scales = ctx.layer.fp8.recipe, ctx.scales
        for_input, for_weight = ctx.layer.quantize_gradient(grads[0].flatten(0, -2))
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight = fake_quantize(
                weight_NK, _FORWARD, recipe, contracted=0, is_weight=True, scale=scales.get("weight")
            )
            grad_input = (for_input @ weight).to(input.dtype).view(input.shape)
        if ctx.needs_input_grad[1]:
            input_TK = fake_quantize(input.flatten(0, -2), _FORWARD, recipe, contracted=0, scale=scales.get("input"))
            grad_weight = (for_weight.t() @ input_TK).to(weight_NK.dtype)
        return grad_input, grad_weight, None, None
