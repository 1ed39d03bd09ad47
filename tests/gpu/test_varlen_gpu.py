"""torch's variable-length kernel on a GPU is attention under the plan, in bf16, forward and backward.

What the CPU cannot show: that the kernel's own alignment, head groups and uncovered rows are what `varlen_attend` takes
them to be. Legend: T rows, A query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megadpo.attention_plan import AttentionPlan, Segment
from megadpo.device import Device
from megadpo.models.varlen import varlen_attend, why_not_varlen
from tests.helpers.plans import packed, shared_prompt, side_by_side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none")

GPU = torch.device("cuda", 0)
PLANS = {
    "self": packed(512)[0],
    "shared": shared_prompt(384, 200, 333)[0],
    "one-token": side_by_side(shared_prompt(64, 1, 1), packed(1), shared_prompt(1, 1, 1), packed(1, 1))[0],
    "40 segments": side_by_side(*(shared_prompt(10 + 3 * n, 5 + n, 40 - n) for n in range(20)))[0],
    "odd lengths": side_by_side(shared_prompt(131, 17, 259), shared_prompt(3, 127, 65), packed(77))[0],
}


@contextmanager
def deterministic() -> Iterator[None]:
    """The kernel's backward in its deterministic form; memory that a kernel leaves unwritten holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_qkv(plan: AttentionPlan, heads: int, kv_heads: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(plan.num_tokens, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).to(GPU, torch.bfloat16).requires_grad_() for s in shapes]


def segment_mask(segment: Segment, *, aligned_at: str) -> torch.Tensor:
    """Which [query, key] of the segment may meet, with causality aligned at the 'bottom right' or the 'top left'."""
    queries = segment.stop - segment.start
    keys = sum(stop - start for start, stop in segment.key_ranges)
    offset = keys - queries if aligned_at == "bottom right" else 0
    return torch.ones(queries, keys, dtype=torch.bool, device=GPU).tril(offset)


def oracle(plan: AttentionPlan, qkv: list[torch.Tensor], *, aligned_at: str = "bottom right") -> torch.Tensor:
    """fp32 SDPA, segment by segment, under a mask that is written out: [T, A, D]."""
    q_ATD, k_GTD, v_GTD = (t.float().transpose(0, 1) for t in qkv)
    outputs = []
    for segment in plan.segments:
        rows = torch.cat([torch.arange(start, stop, device=GPU) for start, stop in segment.key_ranges])
        repeats = q_ATD.shape[0] // k_GTD.shape[0]
        k, v = (t[:, rows].repeat_interleave(repeats, 0) for t in (k_GTD, v_GTD))
        mask = segment_mask(segment, aligned_at=aligned_at)
        q = q_ATD[:, segment.start : segment.stop]
        outputs.append(scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


def random_gradient(qkv: list[torch.Tensor]) -> torch.Tensor:
    """A gradient of the output, the same at each call."""
    return torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(8)).to(GPU, torch.bfloat16)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def forward_and_gradients(plan: AttentionPlan, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of q, k and v."""
    with deterministic():
        output = varlen_attend(plan, GPU)(*qkv, None)
        return [output.detach(), *torch.autograd.grad(output, qkv, random_gradient(qkv))]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (14, 2)])
@pytest.mark.parametrize("name", PLANS)
def test_equals_fp32_attention_and_itself(name: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """In bf16, 8 bits of precision; the second run is equal to the last bit."""
    plan = PLANS[name]
    assert why_not_varlen(Device("cuda", GPU), torch.bfloat16, head_dim) is None
    qkv = random_qkv(plan, heads, kv_heads, head_dim)
    results = forward_and_gradients(plan, qkv)
    assert all(torch.equal(a, b) for a, b in zip(results, forward_and_gradients(plan, qkv), strict=True))

    copies = [t.detach().float().requires_grad_() for t in qkv]
    expected = oracle(plan, copies)
    gradients = torch.autograd.grad(expected, copies, random_gradient(qkv).float())
    for actual, wanted in zip(results, [expected, *gradients], strict=True):
        assert relative_error(actual, wanted) < 1e-2


def test_another_alignment_would_be_noticed() -> None:
    """The comparison fails where causality is aligned at the top left, which hides the shared prompt's end."""
    plan = PLANS["shared"]
    qkv = random_qkv(plan, 32, 8, 128)
    assert relative_error(varlen_attend(plan, GPU)(*qkv, None), oracle(plan, qkv, aligned_at="top left")) > 0.1


def test_no_layer_waits_for_the_device() -> None:
    """Neither preparing for a microbatch nor attending, there and back, makes the host wait."""
    plan = PLANS["odd lengths"]
    qkv = random_qkv(plan, 32, 8, 128)
    forward_and_gradients(plan, qkv)  # libraries are loaded and memory is reserved
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = varlen_attend(plan, GPU)(*qkv, None)
        torch.autograd.grad(output, qkv, torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")
