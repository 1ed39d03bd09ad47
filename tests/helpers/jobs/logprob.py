"""What the ranks of a log-prob test do: the same rows against this rank's slice of the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megadpo.loss import logprobs
from megadpo.loss.logprobs import TokenScores, response_log_probs
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import distributed
from tests.helpers.jobs.training import train

# More than any test's logits take.
ROOMY = 2**20


@dataclass(frozen=True)
class HeadCase:
    """Rows, a padded head and a gradient of the log-probs; the first `vocab_size` rows of the head are real."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    targets_N: torch.Tensor
    grad_N: torch.Tensor
    vocab_size: int


@dataclass(frozen=True)
class HeadResult:
    """Log-probs, and one rank's gradients of the hidden states and of its slice of the head."""

    logps_N: torch.Tensor
    grad_hidden_NH: torch.Tensor
    grad_weight_VH: torch.Tensor


def random_case(
    *,
    rows: int,
    hidden: int,
    padded_vocab: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
) -> HeadCase:
    """Values whose softmax is neither flat nor one-hot; padding rows of the head are huge, so that a leak shows.

    `scale` is the size of the real rows' entries.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_VH = torch.randn(padded_vocab, hidden, generator=generator) * scale
    weight_VH[vocab_size:] = 1e4
    targets_N = torch.randint(vocab_size, (rows,), generator=generator)
    if rows >= 2:
        targets_N[0], targets_N[1] = 0, vocab_size - 1
    return HeadCase(
        hidden_NH=torch.randn(rows, hidden, generator=generator).to(dtype),
        weight_VH=weight_VH.to(dtype),
        targets_N=targets_N,
        grad_N=torch.randn(rows, generator=generator),
        vocab_size=vocab_size,
    )


def case_with_ties() -> HeadCase:
    """Whole numbers as logits, so that maxima are shared within a slice of the head and across slices."""
    case = random_case(rows=400, hidden=2, padded_vocab=24, vocab_size=21)
    hidden_NH, weight_VH = case.hidden_NH.round(), case.weight_VH.round()
    return HeadCase(hidden_NH, weight_VH, case.targets_N, case.grad_N, case.vocab_size)


def sliced_weight(case: HeadCase, group: dist.ProcessGroup) -> tuple[torch.Tensor, int]:
    """(a rank's rows of a head that is cut evenly over `group`, where they start)."""
    local_vocab = case.weight_VH.shape[0] // group.size()
    start = group.rank() * local_vocab
    return case.weight_VH[start : start + local_vocab].clone(), start


def run_slice(case: HeadCase, group: dist.ProcessGroup, *, logits_bytes: int = ROOMY) -> HeadResult:
    """The fused log-probs of `case` and their gradients with the head cut evenly over `group`."""
    hidden_NH = case.hidden_NH.clone().requires_grad_()
    weight_VH, start = sliced_weight(case, group)
    weight_VH.requires_grad_()
    scores = response_log_probs(
        hidden_NH,
        weight_VH,
        case.targets_N,
        group=group,
        vocab_start=start,
        vocab_size=case.vocab_size,
        logits_bytes=logits_bytes,
    )
    scores.logps_N.backward(case.grad_N)
    assert hidden_NH.grad is not None and weight_VH.grad is not None
    return HeadResult(scores.logps_N.detach(), hidden_NH.grad, weight_VH.grad)


def run_statistics(case: HeadCase, group: dist.ProcessGroup, *, logits_bytes: int = ROOMY) -> TokenScores:
    """The fused log-probs of `case` with token statistics and without gradient."""
    weight_VH, start = sliced_weight(case, group)
    return response_log_probs(
        case.hidden_NH,
        weight_VH,
        case.targets_N,
        group=group,
        vocab_start=start,
        vocab_size=case.vocab_size,
        logits_bytes=logits_bytes,
        token_statistics=True,
    )


def run_slices(cases: list[dict[str, Any]]) -> list[tuple[np.ndarray, ...]]:
    """`run_slice` of every `random_case(**case)` over the whole world, on this rank; the fields of HeadResult.

    Arrays, because torch sends tensors between processes as handles that die with the sender.
    """
    with distributed(Device("cpu", torch.device("cpu")), timeout_s=60):
        assert dist.group.WORLD is not None
        results = [run_slice(random_case(**case), dist.group.WORLD) for case in cases]
    return [(r.logps_N.numpy(), r.grad_hidden_NH.numpy(), r.grad_weight_VH.numpy()) for r in results]


def run_statistics_slices() -> tuple[list[tuple[np.ndarray, ...]], list[list[int]]]:
    """(log-probs, entropy, top-1 over the whole world of a case with ties, one with many chunks, one without rows;
    the shapes that the second sent around)."""
    with distributed(Device("cpu", torch.device("cpu")), timeout_s=60):
        assert dist.group.WORLD is not None
        scored = [run_statistics(case_with_ties(), dist.group.WORLD)]
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            chunked = random_case(rows=50, hidden=16, padded_vocab=24, vocab_size=17)
            scored.append(run_statistics(chunked, dist.group.WORLD, logits_bytes=1))
        shapes = [list(call.args[0].shape) for call in sent.call_args_list]
        scored.append(run_statistics(random_case(rows=0, hidden=4, padded_vocab=24, vocab_size=17), dist.group.WORLD))
    told = [(s.logps_N, s.statistics.entropy_N, s.statistics.is_top1_N) for s in scored if s.statistics is not None]
    return [tuple(tensor.numpy() for tensor in tensors) for tensors in told], shapes


def train_and_measure_chunks(overrides: list[str]) -> int:
    """Runs a training on this rank; the most response rows that the output layer worked on at a time."""
    heights = []
    logits = logprobs._Workspace.logits

    def recorded(space: logprobs._Workspace, hidden_CH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        heights.append(hidden_CH.shape[0])
        return logits(space, hidden_CH, weight_VH)

    with mock.patch.object(logprobs._Workspace, "logits", recorded):
        train(overrides)
    return max(heights)
