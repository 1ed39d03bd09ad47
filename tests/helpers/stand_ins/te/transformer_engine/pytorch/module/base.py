"""What linear layers have in common: marks of their weights, their collectives, and where weight gradients go."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import torch

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride")


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """A gradient whose numbers nobody may use."""
    return torch.full(shape, 0.0 if zero else math.nan, dtype=dtype)


def mark_as_split(parameter: torch.Tensor, dim: int) -> None:
    assert not any(hasattr(parameter, mark) for mark in _MARKS)
    for mark, value in zip(_MARKS, (True, dim, 1), strict=True):
        setattr(parameter, mark, value)


class MatrixProduct(torch.autograd.Function):
    """inputs · weightᵀ, whose weight gradient goes into the weight's `main_grad` where that is asked for.

    The first microbatch of a step overwrites what is there.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, fuse: bool, first: bool | None) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.fuse, ctx.first, ctx.weight = fuse, first, weight
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        inputs, weight = ctx.saved_tensors
        wgrad = grad.flatten(0, -2).t() @ inputs.flatten(0, -2)
        if ctx.fuse:
            target = ctx.weight.main_grad
            target.copy_(wgrad) if ctx.first else target.add_(wgrad)
            if hasattr(ctx.weight, "grad_added_to_main_grad"):
                ctx.weight.grad_added_to_main_grad = True
                wgrad = get_dummy_wgrad(list(weight.shape), weight.dtype, getattr(ctx.weight, "zero_out_wgrad", False))
            else:
                wgrad = None
        return grad @ weight, wgrad, None, None


class TransformerEngineBaseModule(torch.nn.Module):
    """A linear layer's share of a tensor-parallel group."""

    def build(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        init_method: Callable[..., Any],
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str | None,
        device: Any,
    ) -> None:
        """Makes parameters and attributes with the names that the real layers have."""
        assert parallel_mode in ("column", "row")
        assert not return_bias
        if tp_group is not None:
            tp_size = torch.distributed.get_world_size(tp_group)
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        split = 0 if parallel_mode == "column" else 1
        for size in (out_features, in_features)[split : split + 1]:
            assert size % tp_size == 0
        self.in_features = in_features // tp_size if split else in_features
        self.out_features = out_features if split else out_features // tp_size
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation, self.use_bias = fuse_wgrad_accumulation, bias
        options = {"device": device, "dtype": params_dtype}
        self.weight = torch.nn.Parameter(torch.full((self.out_features, self.in_features), math.nan, **options))
        init_method(self.weight)
        mark_as_split(self.weight, split)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **options))
            if split:
                self.bias.sequence_parallel = self.sequence_parallel
            else:
                mark_as_split(self.bias, 0)
        else:
            self.bias = torch.empty(0, **options)

    def multiply(self, inputs: torch.Tensor, is_first_microbatch: bool | None) -> torch.Tensor:
        """The layer's product with its collectives."""
        from megatron.core.tensor_parallel import mappings

        assert inputs.shape[-1] == self.in_features, "a layer was called with another number of features"
        assert inputs.dtype is self.weight.dtype
        if self.parallel_mode == "column":
            enter: Any = mappings.copy_to_tensor_model_parallel_region
            if self.sequence_parallel:
                enter = mappings.gather_from_sequence_parallel_region
            inputs = enter(inputs, group=self.tp_group)
        if FP8GlobalStateManager.is_fp8_enabled():
            scale = 448.0 / inputs.detach().abs().amax()
            left = (inputs.detach() * scale).to(torch.float8_e4m3fn).to(inputs.dtype) / scale
            inputs = inputs + (left - inputs.detach())
        output = MatrixProduct.apply(inputs, self.weight, self.fuse_wgrad_accumulation, is_first_microbatch)
        if self.parallel_mode == "row":
            leave: Any = mappings.reduce_from_tensor_model_parallel_region
            if self.sequence_parallel:
                leave = mappings.reduce_scatter_to_sequence_parallel_region
            output = leave(output, group=self.tp_group)
        return output + self.bias if self.use_bias else output

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            pickle.loads(state.numpy().tobytes())
