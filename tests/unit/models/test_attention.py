"""Attention by segments is a dense masked softmax, forward and backward, under every kind of plan.

Legend: T rows, A query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megadpo.models.attention import MicrobatchAttention, PlanAttention
from megadpo.models.attention_plan import AttentionPlan
from megadpo.models.rotary import RotaryTable, rotate
from megadpo.models.sdpa import sdpa_attend
from megadpo.models.segments import Segments
from tests.helpers.plans import PLANS, dense, packed_plan

A, D = 4, 8


def attention(softmax_scale: float | None = None) -> PlanAttention:
    config = TransformerConfig(num_layers=1, hidden_size=A * D, num_attention_heads=A)
    return PlanAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)


def angles(positions_T: torch.Tensor, dtype: torch.dtype) -> RotaryTable:
    return RotaryTable.of(positions_T, 0.3 ** torch.arange(D // 2), scaling=1.0, dtype=dtype)


def call(
    module: PlanAttention, plan: AttentionPlan, *qkv: torch.Tensor, rotary: RotaryTable | None = None
) -> torch.Tensor:
    """The module under the plan; without angles of its own every row is at position 0, which turns nothing."""
    microbatch = MicrobatchAttention(
        num_tokens=plan.num_tokens,
        attend=sdpa_attend(plan, torch.device("cpu"), qkv[0].dtype),
        rotary=rotary or angles(torch.zeros(qkv[0].shape[0]), qkv[0].dtype),
    )
    result: torch.Tensor = module(
        *qkv, None, attn_mask_type=AttnMaskType.causal, attention_bias=None, packed_seq_params=microbatch
    )
    return result


def random_qkv(num_tokens: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(num_tokens, 1, heads, D) for heads in (A, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


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


def test_queries_and_keys_are_rotated_and_values_are_not() -> None:
    plan, allowed_TT = PLANS["shared prompt"]
    query, key, value = random_qkv(plan.num_tokens, 2, torch.float64)
    rotary = angles(torch.tensor([*range(7), *range(4, 9)]), torch.float64)
    output = call(attention(), plan, query, key, value, rotary=rotary)
    expected = dense(allowed_TT, rotate(query, rotary), rotate(key, rotary), value, scale=D**-0.5)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[4], [4, 2]])
def test_a_plan_of_another_length_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"attention over 5 rows has a plan for {sum(lengths)}"):
        call(attention(), packed_plan(lengths), *random_qkv(5, 2, torch.float32))


def test_megatron_is_left_the_layout_of_rows() -> None:
    """'thd' would make Megatron take the stream apart on its own."""
    plan = packed_plan([2, 3])
    attend = sdpa_attend(plan, torch.device("cpu"), torch.float32)
    microbatch = MicrobatchAttention(num_tokens=5, attend=attend, rotary=angles(torch.zeros(5), torch.float32))
    assert microbatch.qkv_format == "sbhd"


def test_a_segment_s_mask_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of each layer would be kept for the backward: gigabytes for long pairs."""
    plan, _ = PLANS["pairs and a padding tail"]
    attend = sdpa_attend(plan, torch.device("cpu"), torch.float32)
    masks: list[torch.Tensor] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: torch.Tensor, attn_mask: torch.Tensor | None, **options: object) -> torch.Tensor:
        if attn_mask is not None:
            masks.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr("megadpo.models.sdpa.scaled_dot_product_attention", recorded)
    qkv = [t.detach().squeeze(1) for t in random_qkv(plan.num_tokens, 2, torch.float32)]
    for _ in range(3):
        attend(*qkv, None)
    assert [mask.shape for mask in masks] == 3 * [(5, 9), (2, 3)]
    assert len({mask.data_ptr() for mask in masks}) == 2


@pytest.mark.parametrize("name", PLANS)
def test_keys_are_those_of_the_plan(name: str) -> None:
    plan, _ = PLANS[name]
    segments = Segments.of(plan)
    states = torch.arange(plan.num_tokens, dtype=torch.float64)[:, None].requires_grad_()
    seen = [[row for start, stop in s.key_ranges for row in range(start, stop)] for s in plan.segments]
    assert [keys.squeeze(1).tolist() for keys in segments.keys(states)] == seen
    assert [len(rows) for rows in seen] == list(segments.key_lengths)
    gathered, rows = segments.gathered_keys(states), [row for own in seen for row in own]
    assert gathered.squeeze(1).tolist() == rows
    weights = torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gathered * weights).sum().backward()
    expected = torch.zeros(plan.num_tokens, 1, dtype=torch.float64).index_add(0, torch.tensor(rows), weights)
    torch.testing.assert_close(states.grad, expected, rtol=1e-15, atol=0)
