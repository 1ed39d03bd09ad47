"""The gated activation is silu(gate) · up, with autograd's gradient and nothing kept but its input."""

from __future__ import annotations

import pytest
import torch

from megadpo.models.activation import swiglu


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_equals_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = (3 * torch.randn(5, 1, 14, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    formula = ours.detach().clone().requires_grad_()
    gate, up = formula.chunk(2, dim=-1)
    output, expected = swiglu(ours), torch.nn.functional.silu(gate) * up
    assert output.shape == (5, 1, 7) and output.dtype is dtype
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn(5, 1, 7, generator=generator, dtype=torch.float64).to(dtype)
    output.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours.grad, formula.grad, rtol=tolerance, atol=tolerance)


def test_runs_backward_once() -> None:
    """The gradient takes the input's memory: a second backward is refused, not wrong."""
    gate_up = torch.randn(5, 14, requires_grad=True)
    output = swiglu(2 * gate_up)
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_keeps_its_input_alone() -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    gate_up = torch.randn(5, 14, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu(gate_up)
    assert [tensor.data_ptr() for tensor in kept] == [gate_up.data_ptr()]
