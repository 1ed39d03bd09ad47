"""The gated activation between the two matrices of a feed-forward layer.

Legend: F columns of the intermediate size on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) · up [..., F] of the first projection's halves [..., 2F]; its backward needs only the input.

    The backward overwrites the input, so it can run only once, and nothing else may need the input's values.

    Megatron's unfused form also saves silu(gate) and a copy of `up`, and its fused one needs a compiler.
    """
    result: torch.Tensor = _SwiGLU.apply(gate_up)
    return result


def te_swiglu() -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns `swiglu` by Transformer Engine's kernel, which also saves only its input and does not overwrite it.

    A function and no module, as Megatron would make it: Megatron (0.16) asks each module of a feed-forward layer for
    its sharded state dict, which Transformer Engine's activation does not have.
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
        # The input is not needed any more: its gradient reuses its memory.
        torch.mul(silu(gate), grad, out=up)
        torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=gate)
        return gate_up
