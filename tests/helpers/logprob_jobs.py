"""What the ranks of a log-prob test do: the same rows against this rank's slice of the head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megadpo.device import Device
from megadpo.logprobs import response_log_probs
from megadpo.parallel.state import distributed


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
    *, rows: int, hidden: int, padded_vocab: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> HeadCase:
    """Values whose softmax is neither flat nor one-hot; padding rows of the head are huge, so that a leak shows."""
    generator = torch.Generator().manual_seed(seed)
    weight_VH = torch.randn(padded_vocab, hidden, generator=generator)
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


def run_slice(case: HeadCase, group: dist.ProcessGroup) -> HeadResult:
    """The fused log-probs of `case` and their gradients with the head cut evenly over `group`."""
    local_vocab = case.weight_VH.shape[0] // group.size()
    start = group.rank() * local_vocab
    hidden_NH = case.hidden_NH.clone().requires_grad_()
    weight_VH = case.weight_VH[start : start + local_vocab].clone().requires_grad_()
    logps_N = response_log_probs(
        hidden_NH, weight_VH, case.targets_N, group=group, vocab_start=start, vocab_size=case.vocab_size
    )
    logps_N.backward(case.grad_N)
    assert hidden_NH.grad is not None and weight_VH.grad is not None
    return HeadResult(logps_N.detach(), hidden_NH.grad, weight_VH.grad)


def run_slices(cases: list[dict[str, int]]) -> list[tuple[np.ndarray, ...]]:
    """`run_slice` of every `random_case(**case)` over the whole world, on this rank; the fields of HeadResult.

    Arrays, because torch sends tensors between processes as handles that die with the sender.
    """
    with distributed(Device("cpu", torch.device("cpu")), timeout_s=60):
        assert dist.group.WORLD is not None
        results = [run_slice(random_case(**case), dist.group.WORLD) for case in cases]
    return [(r.logps_N.numpy(), r.grad_hidden_NH.numpy(), r.grad_weight_VH.numpy()) for r in results]
