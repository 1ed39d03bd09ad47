"""Rotated states are transformers' own, and the gradient is the rotation back."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from megadpo.models.rotary import RotaryTable, rotate

T, A, D = 7, 3, 16


def table(*, scaling: float, dtype: torch.dtype) -> RotaryTable:
    positions_T = torch.tensor([0, 1, 2, 3, 1, 2, 900])
    return RotaryTable.of(positions_T, 0.5 ** torch.arange(D // 2), scaling=scaling, dtype=dtype)


def by_transformers(states_T1AD: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
    cos, sin = (t[:, 0, 0][None] for t in (rotary.cos_T11D, rotary.sin_T11D))
    states_1ATD = states_T1AD.permute(1, 2, 0, 3)
    return apply_rotary_pos_emb(states_1ATD, states_1ATD, cos, sin)[0].permute(2, 0, 1, 3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_equals_transformers(dtype: torch.dtype, tolerance: float) -> None:
    rotary = table(scaling=1.3, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    # A slice, as queries are of a joint projection: the rows do not lie side by side.
    wide = torch.randn(T, 1, A, 2 * D, generator=generator, dtype=torch.float64).to(dtype)
    ours, theirs = (wide[..., :D].detach().clone().requires_grad_() for _ in range(2))
    assert torch.equal(rotate(wide[..., :D], rotary), rotate(ours, rotary))
    output, expected = rotate(ours, rotary), by_transformers(theirs, rotary)
    assert output.dtype is dtype
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn(T, 1, A, D, generator=generator, dtype=torch.float64).to(dtype)
    output.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_angles_are_fp32_whatever_the_dtype() -> None:
    """bf16 has eight bits: position 900 would be off by two."""
    fine, coarse = (table(scaling=1.0, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    torch.testing.assert_close(coarse.cos_T11D.double(), fine.cos_T11D, rtol=0, atol=2**-8)
    torch.testing.assert_close(coarse.sin_T11D.double(), fine.sin_T11D, rtol=0, atol=2**-8)


def test_the_input_is_left_as_it_is() -> None:
    states = torch.randn(T, 1, A, D)
    before = states.clone()
    rotate(states, table(scaling=1.0, dtype=torch.float32))
    assert torch.equal(states, before)
