"""Operations that can be fused; here each is a module of its own."""

from __future__ import annotations

import torch


class FusibleOperation(torch.nn.Module):
    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0


class Sequential:
    """Named in annotations of Megatron's."""


class _ActivationOperation(FusibleOperation):
    def __init__(self, *, cache_quantized_input: bool = False) -> None:
        super().__init__()
        assert not cache_quantized_input


class SwiGLU(_ActivationOperation):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        gate, up = input.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
