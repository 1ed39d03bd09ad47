"""One forward path for training, evaluation and the reference: Megatron's forward_step contract over our batches.

Legend: B pairs of a microbatch, S = 2·B sequences, N response rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import GlobalBatch
from megadpo.logprobs import sequence_sums
from megadpo.losses import PairLogProbs, PreferenceLoss, pair_statistics

# What the last stage makes of one microbatch's response log-probs [N]: its index, its batch, the log-probs.
Closure = Callable[[int, PreferenceBatch, torch.Tensor], Any]


@dataclass(frozen=True, slots=True)
class SequenceLogProbs:
    """Summed response log-probs of a microbatch's pairs, fp64 [B] each."""

    chosen_B: torch.Tensor
    rejected_B: torch.Tensor


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batch: GlobalBatch,
    closure: Closure,
    *,
    device: torch.device,
    forward_only: bool,
) -> list[Any]:
    """Runs Megatron's pipeline schedule over this rank's microbatches; what the closure gave per microbatch, in order.

    The list is empty on every stage but the last. With `forward_only` the closure's result comes back untouched;
    otherwise it is Megatron's triple (sum of losses, number of pairs, data) and the data come back. Collectives: the
    schedule's own over the pipeline and tensor groups, and in training the gradient reduction over the data group.
    """

    def iterator() -> Iterator[tuple[int, PreferenceBatch]]:
        for index, microbatch in enumerate(batch.microbatches):
            yield index, microbatch.to(device)

    def forward_step(data: Iterator[tuple[int, PreferenceBatch]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        index, microbatch = next(data)
        output = model(
            microbatch.tokens_1T,
            microbatch.positions_T,
            microbatch.plan,
            microbatch.response_rows_N,
            microbatch.targets_N,
        )
        return output, partial(_finish, index, microbatch)

    def _finish(index: int, microbatch: PreferenceBatch, logps_N: torch.Tensor, non_loss_data: bool = False) -> Any:
        return closure(index, microbatch, logps_N)

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iterator() for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batch.microbatches),
        seq_length=batch.stream_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results


def sum_log_probs(microbatch: PreferenceBatch, logps_N: torch.Tensor) -> SequenceLogProbs:
    """Per-pair sums of the response tokens' log-probs."""
    sums_S = sequence_sums(logps_N, microbatch.sequence_index_N, 2 * microbatch.num_pairs)
    return SequenceLogProbs(sums_S[: microbatch.num_pairs], sums_S[microbatch.num_pairs :])


def pair_log_probs(microbatch: PreferenceBatch, policy: SequenceLogProbs, reference: SequenceLogProbs) -> PairLogProbs:
    """Everything that a loss needs to know of a microbatch's pairs."""
    pairs = microbatch.num_pairs
    return PairLogProbs(
        policy_chosen_B=policy.chosen_B,
        policy_rejected_B=policy.rejected_B,
        reference_chosen_B=reference.chosen_B,
        reference_rejected_B=reference.rejected_B,
        chosen_tokens_B=microbatch.response_tokens_S[:pairs],
        rejected_tokens_B=microbatch.response_tokens_S[pairs:],
    )


def score(chunks: Sequence[torch.nn.Module], batch: GlobalBatch, *, device: torch.device) -> list[SequenceLogProbs]:
    """Per-pair log-probs of this rank's microbatches under a model, without gradients; [] on all but the last stage."""

    def closure(index: int, microbatch: PreferenceBatch, logps_N: torch.Tensor) -> SequenceLogProbs:
        return sum_log_probs(microbatch, logps_N)

    with torch.no_grad():
        return run_schedule(chunks, batch, closure, device=device, forward_only=True)


def preference_statistics(
    loss: PreferenceLoss, microbatch: PreferenceBatch, logps_N: torch.Tensor, reference: SequenceLogProbs
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(sum of the pairs' losses, fp64 scalar with gradient; sums of what is logged, the pair count among them)."""
    logps = pair_log_probs(microbatch, sum_log_probs(microbatch, logps_N), reference)
    loss_B = loss(logps)
    sums = pair_statistics(loss_B, logps, beta=loss.beta)
    sums["pairs"] = torch.full((), microbatch.num_pairs, dtype=torch.float64, device=logps_N.device)
    return loss_B.sum(), sums
