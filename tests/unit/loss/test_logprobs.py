"""Fused log-probs are log_softmax + gather, in values and gradients, whole or sharded, in one chunk or many.

Legend: N response rows, H hidden size, V rows of the head (padding included).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megadpo.loss import logprobs
from megadpo.loss.logprobs import TokenScores, chunk_rows, response_log_probs, sequence_sums
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import distributed
from tests.helpers.jobs.logprob import (
    ROOMY,
    HeadCase,
    HeadResult,
    case_with_ties,
    random_case,
    run_slice,
    run_slices,
    run_statistics,
    run_statistics_slices,
)
from tests.helpers.launch import launch


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
    for name in FIELDS:
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
# Logits of a trained model's size: a standard deviation of 1.6.
REALISTIC = {"rows": 192, "hidden": 64, "padded_vocab": 2048, "vocab_size": 2001, "scale": 0.2}
FIELDS = ("logps_N", "grad_hidden_NH", "grad_weight_VH")


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


def score(
    case: HeadCase, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, group: dist.ProcessGroup, *, logits_bytes: int
) -> TokenScores:
    return response_log_probs(
        hidden_NH,
        weight_VH,
        case.targets_N,
        group=group,
        vocab_start=0,
        vocab_size=case.vocab_size,
        logits_bytes=logits_bytes,
    )


def bytes_for(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> int:
    """The smallest memory for logits that holds so many rows."""
    return next(n for n in range(1, ROOMY) if chunk_rows(vocab, dtype=dtype, logits_bytes=n) == rows)


class CountedRows:
    """Heights of the chunks whose logits were computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heights: list[int] = []
        logits = logprobs._Workspace.logits

        def recorded(space: logprobs._Workspace, hidden_CH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
            self.heights.append(hidden_CH.shape[0])
            return logits(space, hidden_CH, weight_VH)

        monkeypatch.setattr(logprobs._Workspace, "logits", recorded)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 10])
def test_chunks_change_nothing(rows_per_chunk: int, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    case, counted = CASES["padding"], CountedRows(monkeypatch)
    result = run_slice(case, group, logits_bytes=bytes_for(rows_per_chunk, 24))
    assert_same(result, by_log_softmax(case), tolerance=1e-5)
    assert max(counted.heights) == rows_per_chunk
    assert sum(counted.heights) == 2 * 11  # every row once forward and once backward


def test_the_only_chunk_is_kept_for_the_backward(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix product less, and bit for bit the same: the second backward computes what the first one had."""
    case, counted = CASES["padding"], CountedRows(monkeypatch)
    hidden_NH, weight_VH = case.hidden_NH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    gradients = []
    logps_N = score(case, hidden_NH, weight_VH, group, logits_bytes=bytes_for(11, 24)).logps_N
    for expected in ([11], [11, 11]):
        gradients.append(torch.autograd.grad(logps_N, (hidden_NH, weight_VH), case.grad_N, retain_graph=True))
        assert counted.heights == expected
    for kept, computed in zip(*gradients, strict=True):
        assert torch.equal(kept, computed)


def test_nothing_is_kept_without_a_backward(group: dist.ProcessGroup) -> None:
    case = CASES["padding"]
    weight_VH = case.weight_VH.clone().requires_grad_()
    with torch.no_grad(), mock.patch.object(logprobs._ResponseLogProbs, "apply") as apply:
        apply.return_value = (None, None, None)
        score(case, case.hidden_NH, weight_VH, group, logits_bytes=ROOMY)
        assert apply.call_args.args[-1] is False
    with torch.inference_mode():
        logps_N = score(case, case.hidden_NH, weight_VH, group, logits_bytes=ROOMY).logps_N
    torch.testing.assert_close(logps_N.double(), by_log_softmax(case).logps_N, rtol=1e-5, atol=1e-5)


def test_a_row_wider_than_the_budget_is_a_chunk_of_its_own(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = CountedRows(monkeypatch)
    case = CASES["padding"]
    assert_same(run_slice(case, group, logits_bytes=1), by_log_softmax(case), tolerance=1e-5)
    assert counted.heights == [1] * 22


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [24, 1000, 32003, 128256])
@pytest.mark.parametrize("mib", [1, 7, 128])
def test_a_chunk_and_the_copy_of_a_part_fit_into_the_budget(dtype: torch.dtype, vocab: int, mib: int) -> None:
    """And fill it to nine tenths, where a row is a small part of it."""
    rows = chunk_rows(vocab, dtype=dtype, logits_bytes=mib * 2**20)
    space = logprobs._Workspace(rows, torch.empty(vocab, 8, dtype=dtype, device="meta"))
    taken = sum(t.numel() * t.itemsize for t in (space.fp32, space.low) if t is not None)
    part = -(-rows // 16) * vocab * 4
    assert rows == 1 or taken + part <= mib * 2**20
    if rows > 20:
        assert taken >= 0.9 * mib * 2**20


def test_bf16_rounds_logits_and_nothing_after_them(group: dist.ProcessGroup) -> None:
    case = random_case(rows=64, hidden=32, padded_vocab=96, vocab_size=90, dtype=torch.bfloat16)
    result = run_slice(case, group)
    assert result.logps_N.dtype is torch.float32
    assert result.grad_hidden_NH.dtype is result.grad_weight_VH.dtype is torch.bfloat16
    rounded_NV = torch.nn.functional.linear(case.hidden_NH, case.weight_VH)[:, : case.vocab_size].double()
    expected_N = rounded_NV.log_softmax(-1).gather(1, case.targets_N[:, None]).squeeze(1)
    torch.testing.assert_close(result.logps_N.double(), expected_N, rtol=1e-6, atol=1e-5)


def by_autograd(case: HeadCase) -> HeadResult:
    """What autograd makes of log_softmax + gather in the case's own format, from fp32 on where that is lower."""
    hidden_NH, weight_VH = case.hidden_NH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH[: case.vocab_size]).float()
    logps_N = logits_NV.log_softmax(-1).gather(1, case.targets_N[:, None]).squeeze(1)
    logps_N.backward(case.grad_N)
    assert hidden_NH.grad is not None and weight_VH.grad is not None
    return HeadResult(logps_N.detach(), hidden_NH.grad, weight_VH.grad)


def errors(actual: HeadResult, expected: HeadResult) -> dict[str, float]:
    """Distance of each field as a share of its norm."""
    pairs = {name: (getattr(actual, name).double(), getattr(expected, name).double()) for name in FIELDS}
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("logits_bytes", [2**24, 2**18], ids=["one chunk", "many chunks"])
def test_fp32_gradients_are_exact_to_a_millionth(group: dist.ProcessGroup, logits_bytes: int) -> None:
    case = random_case(**REALISTIC)
    result = run_slice(case, group, logits_bytes=logits_bytes)
    assert max(errors(result, by_log_softmax(case)).values()) < 1e-6


@pytest.mark.parametrize("logits_bytes", [2**24, 2**18], ids=["one chunk", "many chunks"])
def test_bf16_gradients(group: dist.ProcessGroup, logits_bytes: int) -> None:
    """To 5e-3 of the exact ones from the same bf16 numbers, and of autograd's from the same bf16 logits."""
    case = random_case(**REALISTIC, dtype=torch.bfloat16)
    result = run_slice(case, group, logits_bytes=logits_bytes)
    assert max(errors(result, by_log_softmax(case)).values()) < 5e-3
    assert max(errors(result, by_autograd(case)).values()) < 5e-3


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained: str, group: dist.ProcessGroup) -> None:
    """A frozen head still gives the gradient of the hidden states, without the product for its own."""
    case = CASES["padding"]
    hidden_NH = case.hidden_NH.clone().requires_grad_(trained == "hidden")
    weight_VH = case.weight_VH.clone().requires_grad_(trained == "weight")
    logps_N = score(case, hidden_NH, weight_VH, group, logits_bytes=ROOMY).logps_N
    add_product = logprobs._Workspace.add_product
    with mock.patch.object(logprobs._Workspace, "add_product", autospec=True, side_effect=add_product) as product:
        logps_N.backward(case.grad_N)
    expected = by_log_softmax(case)
    if trained == "hidden":
        assert weight_VH.grad is None and not product.called
        torch.testing.assert_close(hidden_NH.grad.double(), expected.grad_hidden_NH, rtol=1e-5, atol=1e-5)
    else:
        assert hidden_NH.grad is None
        torch.testing.assert_close(weight_VH.grad.double(), expected.grad_weight_VH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits_bytes", [2**24, 2**18], ids=["one chunk", "many chunks"])
def test_a_weight_of_megatrons_ddp_gets_its_gradient_in_main_grad(
    dtype: torch.dtype, logits_bytes: int, group: dist.ProcessGroup
) -> None:
    """Added to what is there, in fp32, and announced."""
    case = random_case(**REALISTIC, dtype=dtype)
    expected = by_log_softmax(case).grad_weight_VH
    weight_VH = case.weight_VH.clone().requires_grad_()
    weight_VH.main_grad, weight_VH.grad_added_to_main_grad = torch.ones(weight_VH.shape), False
    score(case, case.hidden_NH, weight_VH, group, logits_bytes=logits_bytes).logps_N.backward(case.grad_N)
    assert weight_VH.grad_added_to_main_grad is True
    assert weight_VH.grad is not None and weight_VH.grad.dtype is dtype
    error = (weight_VH.main_grad.double() - 1 - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype is torch.float32 else 5e-3)


def test_a_tied_weight_gets_the_embeddings_gradient_through_autograd_alone(group: dist.ProcessGroup) -> None:
    case = CASES["padding"]
    weight_VH = case.weight_VH.clone().requires_grad_()
    weight_VH.main_grad, weight_VH.grad_added_to_main_grad = torch.zeros(weight_VH.shape), False
    weight_VH.zero_out_wgrad = True
    logps_N = score(case, case.hidden_NH, weight_VH, group, logits_bytes=ROOMY).logps_N
    (weight_VH[3].sum() + (logps_N * case.grad_N).sum()).backward()
    expected = torch.zeros(weight_VH.shape)
    expected[3] = 1.0
    assert torch.equal(weight_VH.grad, expected)
    torch.testing.assert_close(weight_VH.main_grad.double(), by_log_softmax(case).grad_weight_VH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tensor", [2, 4])
def test_sharded_equals_whole(tensor: int) -> None:
    """Equal log-probs on every rank, hidden gradients that add up, slices of the head's gradient that join up."""
    for name, *arrays in zip(
        [*CASES, "realistic"], *launch(tensor, run_slices, [*SHAPES.values(), REALISTIC]), strict=True
    ):
        ranks = [HeadResult(*map(torch.from_numpy, fields)) for fields in arrays]
        assert all(torch.equal(rank.logps_N, ranks[0].logps_N) for rank in ranks), name
        joined = HeadResult(
            ranks[0].logps_N,
            torch.stack([rank.grad_hidden_NH for rank in ranks]).sum(0),
            torch.cat([rank.grad_weight_VH for rank in ranks]),
        )
        if name == "realistic":
            assert max(errors(joined, by_log_softmax(random_case(**REALISTIC))).values()) < 1e-6
        else:
            assert_same(joined, by_log_softmax(CASES[name]), tolerance=1e-5)


def naive_statistics(case: HeadCase) -> tuple[torch.Tensor, torch.Tensor]:
    """(entropy in fp64, whether argmax is the target) from full logits of the real vocabulary."""
    logits_NV = (case.hidden_NH @ case.weight_VH[: case.vocab_size].T).double()
    log_p_NV = logits_NV.log_softmax(-1)
    return -(log_p_NV.exp() * log_p_NV).sum(-1), logits_NV.argmax(-1) == case.targets_N


@pytest.mark.parametrize("logits_bytes", [ROOMY, 1], ids=["one chunk", "a row at a time"])
@pytest.mark.parametrize("name", [*CASES, "ties"])
def test_token_statistics(name: str, logits_bytes: int, group: dist.ProcessGroup) -> None:
    case = case_with_ties() if name == "ties" else CASES[name]
    scores = run_statistics(case, group, logits_bytes=logits_bytes)
    entropy_N, is_top1_N = naive_statistics(case)
    assert scores.statistics is not None
    torch.testing.assert_close(scores.statistics.entropy_N.double(), entropy_N, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.statistics.is_top1_N, is_top1_N)


def test_token_statistics_leave_log_probs_and_gradients_alone(group: dist.ProcessGroup) -> None:
    case = random_case(**REALISTIC)
    plain = run_slice(case, group)
    with mock.patch("tests.helpers.jobs.logprob.response_log_probs", side_effect=with_statistics):
        told = run_slice(case, group)
    for name in FIELDS:
        assert torch.equal(getattr(told, name), getattr(plain, name)), name


def with_statistics(*args: torch.Tensor, **options: object) -> TokenScores:
    scores = response_log_probs(*args, **options, token_statistics=True)  # type: ignore[arg-type]
    assert scores.statistics is not None and not scores.statistics.entropy_N.requires_grad
    return scores


def test_sharded_token_statistics_and_what_they_send() -> None:
    """Two all-reduces, however many chunks; maxima that slices share count for the first of them."""
    ties, chunked = case_with_ties(), random_case(rows=50, hidden=16, padded_vocab=24, vocab_size=17)
    tied_maxima = ties.hidden_NH @ ties.weight_VH[: ties.vocab_size].T
    tied_maxima = tied_maxima == tied_maxima.amax(-1, keepdim=True)
    assert ((tied_maxima[:, :12].any(-1)) & (tied_maxima[:, 12:].any(-1))).any()
    for scored, shapes in launch(2, run_statistics_slices):
        assert shapes == [[50], [4, 50]]
        for case, (_, entropy, is_top1) in zip((ties, chunked), scored[:2], strict=True):
            expected_entropy, expected_top1 = naive_statistics(case)
            torch.testing.assert_close(torch.from_numpy(entropy).double(), expected_entropy, rtol=1e-5, atol=1e-5)
            assert is_top1.tolist() == expected_top1.tolist()
        assert [array.shape for array in scored[2]] == [(0,)] * 3


def test_sums_are_fp64_per_sequence() -> None:
    """8 000 log-probs of one sequence: fp32 summation would be off by far more than the tolerance."""
    generator = torch.Generator().manual_seed(0)
    logps_N = -torch.rand(8003, generator=generator) * 2
    sums_S = sequence_sums(logps_N, torch.tensor([8000, 0, 3, 0]))
    assert sums_S.dtype is torch.float64
    values = logps_N.tolist()
    expected = [math.fsum(values[:8000]), 0.0, math.fsum(values[8000:]), 0.0]
    torch.testing.assert_close(sums_S, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_sums_hand_each_row_its_sequence_gradient() -> None:
    logps_N = torch.zeros(5, requires_grad=True)
    sequence_sums(logps_N, torch.tensor([1, 3, 0, 1])).backward(torch.tensor([2.0, 3.0, 5.0, 7.0]).double())
    assert logps_N.grad is not None
    assert logps_N.grad.dtype is torch.float32
    assert logps_N.grad.tolist() == [2.0, 3.0, 3.0, 3.0, 7.0]


def test_sums_of_a_filler_without_pairs() -> None:
    assert sequence_sums(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
