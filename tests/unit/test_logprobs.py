"""Fused log-probs are log_softmax + gather, in values and gradients, whole or sharded, in one chunk or many.

Legend: N response rows, H hidden size, V rows of the head (padding included).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megadpo import logprobs
from megadpo.device import Device
from megadpo.logprobs import response_log_probs, sequence_sums
from megadpo.parallel.state import distributed
from tests.helpers.launch import launch
from tests.helpers.logprob_jobs import HeadCase, HeadResult, random_case, run_slice, run_slices


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """A tensor-parallel group of one."""
    with distributed(Device("cpu", torch.device("cpu")), timeout_s=60):
        assert dist.group.WORLD is not None
        yield dist.group.WORLD


def by_log_softmax(case: HeadCase) -> HeadResult:
    """The same numbers in fp64 from full logits of the real vocabulary."""
    hidden_NH = case.hidden_NH.double().requires_grad_()
    weight_VH = case.weight_VH.double().requires_grad_()
    logits_NV = hidden_NH @ weight_VH[: case.vocab_size].T
    logps_N = logits_NV.log_softmax(-1).gather(1, case.targets_N[:, None]).squeeze(1)
    logps_N.backward(case.grad_N.double())
    assert hidden_NH.grad is not None and weight_VH.grad is not None
    return HeadResult(logps_N.detach(), hidden_NH.grad, weight_VH.grad)


def assert_same(actual: HeadResult, expected: HeadResult, *, tolerance: float) -> None:
    for name in ("logps_N", "grad_hidden_NH", "grad_weight_VH"):
        a, b = getattr(actual, name).double(), getattr(expected, name).double()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


SHAPES = {
    "no padding": {"rows": 11, "hidden": 16, "padded_vocab": 24, "vocab_size": 24},
    "padding": {"rows": 11, "hidden": 16, "padded_vocab": 24, "vocab_size": 17},
    "the second half is all padding": {"rows": 11, "hidden": 16, "padded_vocab": 24, "vocab_size": 12},
    "all but one entry is padding": {"rows": 5, "hidden": 16, "padded_vocab": 24, "vocab_size": 1},
    "one row": {"rows": 1, "hidden": 16, "padded_vocab": 24, "vocab_size": 19},
    "no row": {"rows": 0, "hidden": 16, "padded_vocab": 24, "vocab_size": 19},
}
CASES = {name: random_case(**shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", CASES)
def test_equals_log_softmax(name: str, group: dist.ProcessGroup) -> None:
    case = CASES[name]
    result = run_slice(case, group)
    assert result.logps_N.dtype is torch.float32
    assert_same(result, by_log_softmax(case), tolerance=1e-5)
    assert not result.grad_weight_VH[case.vocab_size :].any()


def test_large_logits_neither_overflow_nor_vanish(group: dist.ProcessGroup) -> None:
    """Logits of thousands, where exp() without the maximum would be infinite and far tokens have tiny probabilities."""
    case = random_case(rows=9, hidden=16, padded_vocab=24, vocab_size=17)
    case = HeadCase(case.hidden_NH * 500, case.weight_VH, case.targets_N, case.grad_N, case.vocab_size)
    expected = by_log_softmax(case)
    assert expected.logps_N.min() < -1000
    result = run_slice(case, group)
    torch.testing.assert_close(result.logps_N.double(), expected.logps_N, rtol=1e-5, atol=2e-3)
    assert torch.isfinite(result.grad_hidden_NH).all()


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 10, 11])
def test_chunks_change_nothing(rows_per_chunk: int, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["padding"]
    vocab = case.weight_VH.shape[0]
    heights: list[int] = []
    whole = logprobs._chunk_logits

    def recorded(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, real_columns: int) -> torch.Tensor:
        heights.append(hidden_CH.shape[0])
        return whole(hidden_CH, weight_VH, real_columns)

    monkeypatch.setattr(logprobs, "_chunk_logits", recorded)
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 4 * vocab * rows_per_chunk)
    assert_same(run_slice(case, group), by_log_softmax(case), tolerance=1e-5)
    assert max(heights) == rows_per_chunk
    assert sum(heights) == 2 * 11  # every row once forward and once backward


def test_a_row_wider_than_the_budget_is_a_chunk_of_its_own(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 1)
    case = CASES["padding"]
    assert_same(run_slice(case, group), by_log_softmax(case), tolerance=1e-5)


def test_bf16_rounds_logits_and_nothing_after_them(group: dist.ProcessGroup) -> None:
    case = random_case(rows=64, hidden=32, padded_vocab=96, vocab_size=90, dtype=torch.bfloat16)
    result = run_slice(case, group)
    assert result.logps_N.dtype is torch.float32
    assert result.grad_hidden_NH.dtype is result.grad_weight_VH.dtype is torch.bfloat16
    rounded_NV = torch.nn.functional.linear(case.hidden_NH, case.weight_VH)[:, : case.vocab_size].double()
    expected_N = rounded_NV.log_softmax(-1).gather(1, case.targets_N[:, None]).squeeze(1)
    torch.testing.assert_close(result.logps_N.double(), expected_N, rtol=1e-6, atol=1e-5)
    exact = by_log_softmax(case)
    for name in ("grad_hidden_NH", "grad_weight_VH"):
        a, b = getattr(result, name).double(), getattr(exact, name)
        assert (a - b).norm() < 2e-2 * b.norm(), name


def test_a_frozen_head_still_gives_the_gradient_of_the_hidden_states(group: dist.ProcessGroup) -> None:
    case = CASES["padding"]
    hidden_NH = case.hidden_NH.clone().requires_grad_()
    logps_N = response_log_probs(
        hidden_NH, case.weight_VH, case.targets_N, group=group, vocab_start=0, vocab_size=case.vocab_size
    )
    logps_N.backward(case.grad_N)
    torch.testing.assert_close(hidden_NH.grad.double(), by_log_softmax(case).grad_hidden_NH, rtol=1e-5, atol=1e-5)


def test_sharded_equals_whole() -> None:
    """Two ranks: equal log-probs, hidden gradients that add up, slices of the head's gradient that join up."""
    for name, *arrays in zip(CASES, *launch(2, run_slices, list(SHAPES.values())), strict=True):
        first, second = (HeadResult(*map(torch.from_numpy, fields)) for fields in arrays)
        assert torch.equal(first.logps_N, second.logps_N), name
        joined = HeadResult(
            first.logps_N,
            first.grad_hidden_NH + second.grad_hidden_NH,
            torch.cat([first.grad_weight_VH, second.grad_weight_VH]),
        )
        assert_same(joined, by_log_softmax(CASES[name]), tolerance=1e-5)


def test_sums_are_fp64_per_sequence() -> None:
    """8 000 log-probs of one sequence: fp32 summation would be off by far more than the tolerance."""
    generator = torch.Generator().manual_seed(0)
    logps_N = -torch.rand(8003, generator=generator) * 2
    index_N = torch.zeros(8003, dtype=torch.long)
    index_N[[5, 600, 7000]] = 2  # rows of a sequence need not be neighbours
    sums_S = sequence_sums(logps_N, index_N, 4)
    assert sums_S.dtype is torch.float64
    values = logps_N.tolist()
    small = math.fsum(values[i] for i in (5, 600, 7000))
    torch.testing.assert_close(
        sums_S, torch.tensor([math.fsum(values) - small, 0.0, small, 0.0], dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_sums_hand_each_row_its_sequence_gradient() -> None:
    logps_N = torch.zeros(5, requires_grad=True)
    sequence_sums(logps_N, torch.tensor([1, 0, 1, 3, 1]), 4).backward(torch.tensor([2.0, 3.0, 5.0, 7.0]).double())
    assert logps_N.grad is not None
    assert logps_N.grad.dtype is torch.float32
    assert logps_N.grad.tolist() == [3.0, 2.0, 3.0, 7.0, 3.0]


def test_sums_of_a_filler_without_pairs() -> None:
    assert sequence_sums(torch.zeros(0), torch.zeros(0, dtype=torch.long), 0).shape == (0,)
