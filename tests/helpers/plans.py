"""Attention plans, what they mean as a mask, and the dense attention under such a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megadpo.models.attention_plan import AttentionPlan, Segment
from megadpo.models.sdpa import Attend


def packed_plan(lengths: Sequence[int]) -> AttentionPlan:
    """The plan of independent causal sequences of the given lengths, laid one after the other."""
    segments, position = [], 0
    for length in lengths:
        span = (position, position + length)
        segments.append(Segment(*span, key_ranges=(span,)))
        position += length
    return AttentionPlan(num_tokens=position, segments=tuple(segments))


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


def side_by_side(*parts: tuple[AttentionPlan, torch.Tensor]) -> tuple[AttentionPlan, torch.Tensor]:
    """The parts one after the other in one stream, blind to each other."""
    segments, start = [], 0
    for plan, _ in parts:
        for segment in plan.segments:
            key_ranges = tuple((first + start, stop + start) for first, stop in segment.key_ranges)
            segments.append(Segment(segment.start + start, segment.stop + start, key_ranges))
        start += plan.num_tokens
    return AttentionPlan(start, tuple(segments)), torch.block_diag(*(mask for _, mask in parts)).bool()


PLANS = {
    "one": packed(9),
    "packed": packed(5, 7, 3),
    "one-token segments": packed(1, 4, 1, 1),
    "shared prompt": shared_prompt(4, 3, 5),
    "shared prompt, responses of one token": shared_prompt(6, 1, 1),
    "split response": split_response(),
    "pairs and a padding tail": side_by_side(shared_prompt(4, 3, 5), shared_prompt(1, 6, 2), packed(3)),
}


def dense(allowed_TT: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float):
    """softmax(scale · QKᵀ, where allowed) V in fp64, as [T, 1, A·D]; query head a reads key head a·G/A."""
    heads_per_group = query.shape[2] // key.shape[2]
    q_ATD = query.double().squeeze(1).transpose(0, 1)
    k_ATD, v_ATD = (t.double().squeeze(1).transpose(0, 1).repeat_interleave(heads_per_group, 0) for t in (key, value))
    scores_ATT = (scale * q_ATD @ k_ATD.transpose(1, 2)).masked_fill(~allowed_TT, -math.inf)
    return (scores_ATT.softmax(-1) @ v_ATD).transpose(0, 1).flatten(1)[:, None]


def random_streams(num_tokens: int, heads: int, kv_heads: int, head_dim: int) -> list[torch.Tensor]:
    """Queries, keys and values [T, heads, D] in fp64, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(num_tokens, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def dense_under_plan(name: str, qkv: Sequence[torch.Tensor], scale: float | None = None) -> torch.Tensor:
    """What attention under the named plan gives, [T, A, D]; the scale is 1/√D by default."""
    _, allowed_TT = PLANS[name]
    scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
    return dense(allowed_TT, *(t[:, None] for t in qkv), scale=scale).view_as(qkv[0])


def assert_dense_under_plan(name: str, attend: Attend, qkv: Sequence[torch.Tensor]) -> None:
    """`attend`, prepared for the named plan, gives the dense attention and its gradients."""
    copies = [t.detach().requires_grad_() for t in qkv]
    output, expected = attend(*qkv, None), dense_under_plan(name, copies)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    output.backward(gradient)
    expected.backward(gradient)
    for actual, copy in zip(qkv, copies, strict=True):
        torch.testing.assert_close(actual.grad, copy.grad, rtol=1e-11, atol=1e-11)
