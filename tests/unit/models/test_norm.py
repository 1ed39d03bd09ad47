"""The norm is transformers' formula with autograd's gradients, and keeps nothing of its output's size."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megadpo.models.norm import RMSNorm

EPS = 1e-3


def formula(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In fp64, as transformers' LlamaRMSNorm."""
    hidden = hidden.double()
    return weight.double() * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPS)


def norm(size: int, dtype: torch.dtype, *, sequence_parallel: bool = False) -> RMSNorm:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=size,
        num_attention_heads=2,
        params_dtype=dtype,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
    )
    module = RMSNorm(config, size, eps=EPS)
    with torch.no_grad():
        module.weight.copy_(1 + torch.rand(size, generator=torch.Generator().manual_seed(2)))
    return module


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("layout", ["rows", "heads", "a view of heads", "rows near zero"])
def test_equals_the_formula(layout: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (7, 1, 3, 8) if "heads" in layout else (7, 1, 24)
    whole = torch.randn(shape, generator=generator) * (1e-2 if layout == "rows near zero" else 3)
    leaf = whole.to(dtype).requires_grad_()
    hidden = leaf[..., 2:6] if layout == "a view of heads" else leaf
    module = norm(hidden.shape[-1], dtype)
    output, expected = module(hidden), formula(hidden, module.weight)
    assert output.shape == hidden.shape and output.dtype is dtype
    gradient = torch.randn(hidden.shape, generator=generator).to(dtype)
    ours = torch.autograd.grad(output, (leaf, module.weight), gradient)
    theirs = torch.autograd.grad(expected, (leaf, module.weight), gradient.double())
    for own, exact in zip((output, *ours), (expected, *theirs), strict=True):
        error = (own.double() - exact.double()).norm() / exact.double().norm()
        assert error < tolerance


def test_keeps_a_number_per_row_beside_its_input() -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    module, hidden = norm(24, torch.float32), torch.randn(7, 1, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(hidden)
    own = {hidden.data_ptr(), module.weight.data_ptr()}
    assert [tensor.numel() for tensor in kept if tensor.data_ptr() not in own] == [7]


def test_without_a_gradient_the_numbers_are_the_same() -> None:
    """The reference is the policy at the first step, to the last bit."""
    module, hidden = norm(24, torch.float32), torch.randn(7, 1, 24)
    with torch.no_grad():
        silent = module(hidden)
    assert torch.equal(module(hidden), silent)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weight_is_marked_for_sequence_parallelism(sequence_parallel: bool) -> None:
    assert norm(8, torch.float32, sequence_parallel=sequence_parallel).weight.sequence_parallel is sequence_parallel
