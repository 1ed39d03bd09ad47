"""Attention by segments is a dense masked softmax, forward and backward, under every kind of plan.

Legend: T rows, A query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megadpo.attention_plan import AttentionPlan, Segment
from megadpo.models.attention import PlanParams, SegmentAttention
from tests.helpers.plans import packed_plan

A, D = 4, 8


def lower_triangle(num_tokens: int) -> torch.Tensor:
    return torch.ones(num_tokens, num_tokens).tril().bool()


def packed(*lengths: int) -> tuple[AttentionPlan, torch.Tensor]:
    """The plan and, from the meaning of packing, which [query, key] may meet: the past of one's own sequence."""
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same_TT = sequence_T[:, None] == sequence_T[None, :]
    return packed_plan(lengths), same_TT & lower_triangle(sum(lengths))


def shared_prompt(prompt: int, chosen: int, rejected: int) -> tuple[AttentionPlan, torch.Tensor]:
    """prompt · chosen · rejected: the past, except that rejected never sees chosen."""
    first, end = prompt + chosen, prompt + chosen + rejected
    plan = AttentionPlan(end, (Segment(0, first, ((0, first),)), Segment(first, end, ((0, prompt), (first, end)))))
    allowed_TT = lower_triangle(end)
    allowed_TT[first:, prompt:first] = False
    return plan, allowed_TT


def split_response() -> tuple[AttentionPlan, torch.Tensor]:
    """A shared prompt whose rejected response is cut in two segments: the last range begins before its queries."""
    _, allowed_TT = shared_prompt(4, 3, 5)
    plan = AttentionPlan(
        12,
        (Segment(0, 7, ((0, 7),)), Segment(7, 9, ((0, 4), (7, 9))), Segment(9, 12, ((0, 4), (7, 12)))),
    )
    return plan, allowed_TT


PLANS = {
    "one": packed(9),
    "packed": packed(5, 7, 3),
    "one-token segments": packed(1, 4, 1, 1),
    "shared prompt": shared_prompt(4, 3, 5),
    "shared prompt, responses of one token": shared_prompt(6, 1, 1),
    "split response": split_response(),
}


def attention(softmax_scale: float | None = None) -> SegmentAttention:
    config = TransformerConfig(num_layers=1, hidden_size=A * D, num_attention_heads=A)
    return SegmentAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)


def call(module: SegmentAttention, plan: AttentionPlan | None, *qkv: torch.Tensor) -> torch.Tensor:
    params = PlanParams(qkv_format="sbhd", plan=plan)
    result: torch.Tensor = module(
        *qkv, None, attn_mask_type=AttnMaskType.causal, attention_bias=None, packed_seq_params=params
    )
    return result


def random_qkv(num_tokens: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(num_tokens, 1, heads, D) for heads in (A, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def dense(allowed_TT: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float):
    """softmax(scale · QKᵀ, where allowed) V in fp64, as [T, 1, A·D]; query head a reads key head a·G/A."""
    heads_per_group = query.shape[2] // key.shape[2]
    q_ATD = query.double().squeeze(1).transpose(0, 1)
    k_ATD, v_ATD = (t.double().squeeze(1).transpose(0, 1).repeat_interleave(heads_per_group, 0) for t in (key, value))
    scores_ATT = (scale * q_ATD @ k_ATD.transpose(1, 2)).masked_fill(~allowed_TT, -math.inf)
    return (scores_ATT.softmax(-1) @ v_ATD).transpose(0, 1).flatten(1)[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", PLANS)
def test_equals_a_dense_masked_softmax(name: str, kv_heads: int, dtype: torch.dtype) -> None:
    plan, allowed_TT = PLANS[name]
    qkv = random_qkv(plan.num_tokens, kv_heads, dtype)
    copies = [t.detach().double().requires_grad_() for t in qkv]
    output = call(attention(), plan, *qkv)
    expected = dense(allowed_TT, *copies, scale=D**-0.5)
    assert output.shape == (plan.num_tokens, 1, A * D)
    assert output.dtype is dtype
    tolerance = 1e-12 if dtype is torch.float64 else 2e-6
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)

    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    output.backward(gradient.to(dtype))
    expected.backward(gradient)
    for actual, copy in zip(qkv, copies, strict=True):
        torch.testing.assert_close(actual.grad.double(), copy.grad, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("name", ["packed", "shared prompt"])
def test_the_softmax_scale_is_used(name: str) -> None:
    plan, allowed_TT = PLANS[name]
    qkv = random_qkv(plan.num_tokens, 2, torch.float64)
    output = call(attention(softmax_scale=0.9), plan, *qkv)
    torch.testing.assert_close(output, dense(allowed_TT, *qkv, scale=0.9), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", [None, packed_plan([4]), packed_plan([4, 2])])
def test_a_plan_of_another_length_is_refused(plan: AttentionPlan | None) -> None:
    with pytest.raises(ValueError, match="attention over 5 rows needs a plan for as many"):
        call(attention(), plan, *random_qkv(5, 2, torch.float32))


def test_plan_params_leave_the_layout_to_rows() -> None:
    """'thd' would make Megatron restart the rotary positions on its own."""
    plan = packed_plan([2, 3])
    params = PlanParams.of(plan)
    assert params.plan is plan
    assert params.qkv_format == "sbhd"
