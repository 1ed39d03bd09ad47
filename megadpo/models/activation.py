"""The gated activation between the two matrices of a feed-forward layer.

Legend: F columns of the intermediate size on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of the first projection's halves [..., 2F], as [..., F]; keeps its input alone for the backward.

    The backward writes over the input, so it runs once, and nobody else may keep the input's values.

    One operation, because Megatron's unfused form keeps silu(gate) and a copy of `up` as well, and its fused one needs
    a compiler.
    """
    result: torch.Tensor = _SwiGLU.apply(gate_up)
    return result


def te_swiglu() -> Callable[[torch.Tensor], torch.Tensor]:
    """`swiglu` by Transformer Engine's kernel, which keeps its input alone too and doesn't write over it.

    A function, not the module that Megatron would make of it: Megatron (0.16) asks each module of a feed-forward layer
    for its part of a checkpoint, and Transformer Engine's activation has no answer.
    """
    from transformer_engine.pytorch.ops import SwiGLU

    operation: Callable[[torch.Tensor], torch.Tensor] = SwiGLU()

    def activation(gate_up: torch.Tensor) -> torch.Tensor:
        return operation(gate_up)

    return activation


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_silu = grad * up
        # The input has served: its gradient takes its place, in memory that is at hand.
        torch.mul(silu(gate), grad, out=up)
        torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=gate)
        return gate_up
