"""Attention kernels on a GPU are attention under the plan, in bf16, forward and backward: the first thing to run.

What the CPU cannot show: that a kernel's own alignment, head groups and uncovered rows are what megadpo takes them to
be. Legend: T rows, A query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megadpo.errors import ConfigError
from megadpo.models.attention_plan import AttentionPlan, Segment
from megadpo.models.kernels import attention_factory, choose_attention
from megadpo.models.sdpa import Attend
from megadpo.runtime.device import Device
from tests.helpers.plans import packed, shared_prompt, side_by_side

GPU = torch.device("cuda", 0)
PLANS = {
    "self": packed(512)[0],
    "shared": shared_prompt(384, 200, 333)[0],
    "one-token": side_by_side(shared_prompt(64, 1, 1), packed(1), shared_prompt(1, 1, 1), packed(1, 1))[0],
    "40 segments": side_by_side(*(shared_prompt(10 + 3 * n, 5 + n, 40 - n) for n in range(20)))[0],
    "odd lengths": side_by_side(shared_prompt(131, 17, 259), shared_prompt(3, 127, 65), packed(77))[0],
}
KERNELS = ["varlen", "transformer_engine"]


@pytest.fixture(autouse=True)
def _fused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's choice of kernels, as a model's construction leaves it."""
    for kernel, enabled in (("FLASH", "0"), ("FUSED", "1"), ("UNFUSED", "0")):
        monkeypatch.setenv(f"NVTE_{kernel}_ATTN", enabled)


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels in their deterministic form."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def leave_nan_in_free_memory() -> None:
    """Fills memory that torch will hand out next: what a kernel leaves unwritten is NaN."""
    blocks = [torch.full((2**n,), math.nan, device=GPU) for n in range(8, 26)]
    torch.cuda.synchronize()
    del blocks


def prepared(kernel: str, plan: AttentionPlan, heads: int, kv_heads: int, head_dim: int) -> Attend:
    """The kernel for the plan; the test is skipped where it can't serve here."""
    try:
        choose_attention(kernel, device=Device("cuda", GPU), dtype=torch.bfloat16, head_dim=head_dim)
    except ConfigError as error:
        pytest.skip(str(error))
    prepare = attention_factory(kernel, dtype=torch.bfloat16, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return prepare(plan, GPU)


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


def forward_and_gradients(attend: Attend, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of q, k and v."""
    leave_nan_in_free_memory()
    output = attend(*qkv, None)
    return [output.detach(), *torch.autograd.grad(output, qkv, random_gradient(qkv))]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (14, 2)])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_fp32_attention(kernel: str, name: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """In bf16, 8 bits of precision."""
    plan = PLANS[name]
    qkv = random_qkv(plan, heads, kv_heads, head_dim)
    results = forward_and_gradients(prepared(kernel, plan, heads, kv_heads, head_dim), qkv)
    copies = [t.detach().float().requires_grad_() for t in qkv]
    expected = oracle(plan, copies)
    gradients = torch.autograd.grad(expected, copies, random_gradient(qkv).float())
    for actual, wanted in zip(results, [expected, *gradients], strict=True):
        assert relative_error(actual, wanted) < 1e-2


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", PLANS)
def test_varlen_repeats_itself_to_the_last_bit(name: str, head_dim: int) -> None:
    plan, qkv = PLANS[name], random_qkv(PLANS[name], 32, 8, head_dim)
    with deterministic():
        attend = prepared("varlen", plan, 32, 8, head_dim)
        first, second = (forward_and_gradients(attend, qkv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_alignment_would_be_noticed(kernel: str) -> None:
    """The comparison fails where causality is aligned at the top left, which hides the shared prompt's end."""
    plan = PLANS["shared"]
    qkv = random_qkv(plan, 32, 8, 128)
    output = prepared(kernel, plan, 32, 8, 128)(*qkv, None)
    assert relative_error(output, oracle(plan, qkv, aligned_at="top left")) > 0.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_layer_waits_for_the_device(kernel: str) -> None:
    """Neither preparing for a microbatch nor attending, there and back, makes the host wait."""
    plan = PLANS["odd lengths"]
    qkv = random_qkv(plan, 32, 8, 128)
    forward_and_gradients(prepared(kernel, plan, 32, 8, 128), qkv)  # libraries are loaded and memory is reserved
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = prepared(kernel, plan, 32, 8, 128)(*qkv, None)
        torch.autograd.grad(output, qkv, torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")
