"""The one forward path of training, evaluation, scoring and the reference: Megatron's forward_step on our batches.

Legend: B pairs of a microbatch, G of a global batch, S = 2·B sequences, N response rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import GlobalBatch
from megadpo.loss.logprobs import TokenScores, sequence_sums
from megadpo.loss.preference import (
    TOKEN_STATISTICS,
    PairLogProbs,
    PreferenceLoss,
    SequenceLogProbs,
    length_statistics,
    pair_statistics,
)
from megadpo.runtime.collectives import gather_rows
from megadpo.runtime.parallel_state import ParallelState

# Called on the last stage for each microbatch, with its index, its batch and the scores of its response tokens.
Closure = Callable[[int, PreferenceBatch, TokenScores], Any]
# Numbers of each pair of a batch, to be reported if the batch's update is skipped: log-probs in nats, and the loss.
PAIR_NUMBERS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "loss")


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batch: GlobalBatch,
    closure: Closure,
    *,
    torch_device: torch.device,
    forward_only: bool,
) -> list[Any]:
    """Runs Megatron's pipeline schedule over this rank's microbatches; returns the closure's results in their order.

    The list is empty on all stages except the last. With `forward_only` no gradients are computed and the closure's
    results are returned unchanged; otherwise the closure returns Megatron's triple (sum of losses, number of pairs,
    data), of which the data are returned. Collectives: the schedule's own over the pipeline and tensor groups, and in
    training the gradient reduction over the data group.
    """

    def iterator() -> Iterator[tuple[int, PreferenceBatch]]:
        for index, microbatch in enumerate(batch.microbatches):
            yield index, microbatch.to(torch_device)

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

    def _finish(index: int, microbatch: PreferenceBatch, scores: TokenScores, non_loss_data: bool = False) -> Any:
        return closure(index, microbatch, scores)

    # Not inference_mode: gloo's thread fills the buffers that sequence-parallel layers gather into, and torch refuses
    # such writes to inference tensors. It would save 0.5 % of a pass.
    with torch.set_grad_enabled(not forward_only):
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


def sum_log_probs(microbatch: PreferenceBatch, scores: TokenScores) -> SequenceLogProbs:
    """Sums of the response tokens' log-probs per pair, and of the tails of the longer responses."""
    pairs = microbatch.num_pairs
    # Rows are ordered pair by pair, lengths list all chosen responses first. Tails begin at the pair's shorter length.
    lengths_B2 = microbatch.response_tokens_S.view(2, pairs).T
    shared_B2 = lengths_B2.amin(dim=1, keepdim=True).expand(pairs, 2)
    parts_B22 = torch.stack((shared_B2, lengths_B2 - shared_B2), dim=2)
    sums_B22 = sequence_sums(scores.logps_N, parts_B22.reshape(-1)).view(pairs, 2, 2)
    sums_B2, tails_B2 = sums_B22.sum(dim=2), sums_B22[:, :, 1]
    return SequenceLogProbs(sums_B2[:, 0], sums_B2[:, 1], tails_B2[:, 0], tails_B2[:, 1])


def score(
    chunks: Sequence[torch.nn.Module], batch: GlobalBatch, *, torch_device: torch.device
) -> list[SequenceLogProbs]:
    """Log-probs per pair of this rank's microbatches under a model, without gradients; [] except on the last stage."""

    def closure(index: int, microbatch: PreferenceBatch, scores: TokenScores) -> SequenceLogProbs:
        return sum_log_probs(microbatch, scores)

    return run_schedule(chunks, batch, closure, torch_device=torch_device, forward_only=True)


def score_batch(
    chunks: Sequence[torch.nn.Module], batch: GlobalBatch, state: ParallelState, torch_device: torch.device
) -> npt.NDArray[np.float64]:
    """Log-probs of the global batch's pairs, in order, on every rank: fp64 [G, 4], columns as SequenceLogProbs' fields.

    One all-gather of [4·G] after the schedule's own collectives.
    """
    columns = [logps.columns() for logps in score(chunks, batch, torch_device=torch_device)]
    return gather_pairs(batch, columns, 4, state, torch_device)


def gather_pairs(
    batch: GlobalBatch, columns_BK: Sequence[torch.Tensor], width: int, state: ParallelState, torch_device: torch.device
) -> npt.NDArray[np.float64]:
    """Gathers the last stage's numbers of all pairs, in the global batch's order, on every rank: fp64 [G, `width`].

    `columns_BK` holds this rank's microbatches, [] except on the last stage. One all-gather of [K·G].
    """
    place = {index: i for i, index in enumerate(batch.pair_indices)}
    values_GK = torch.zeros(len(place), width, dtype=torch.float64, device=torch_device)
    if state.is_last_stage and state.tensor_rank == 0:  # tensor-parallel peers hold the same numbers: one contributes
        for microbatch, values_BK in zip(batch.microbatches, columns_BK, strict=True):
            values_GK[[place[index] for index in microbatch.pair_indices]] = values_BK
    # Every pair is on one rank, and the others add zeros, so the sum only collects.
    return gather_rows(values_GK.flatten()).sum(dim=0).view(-1, width).cpu().numpy()


def pair_log_probs(
    microbatch: PreferenceBatch, policy: SequenceLogProbs, reference: SequenceLogProbs, *, mean_chosen_tokens: float
) -> PairLogProbs:
    """The loss function's input for the microbatch's pairs."""
    pairs = microbatch.num_pairs
    return PairLogProbs(
        policy=policy,
        reference=reference,
        chosen_tokens_B=microbatch.response_tokens_S[:pairs],
        rejected_tokens_B=microbatch.response_tokens_S[pairs:],
        mean_chosen_tokens=mean_chosen_tokens,
    )


def preference_statistics(
    loss: PreferenceLoss,
    microbatch: PreferenceBatch,
    scores: TokenScores,
    reference: SequenceLogProbs,
    *,
    mean_chosen_tokens: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Returns the sum of the pairs' losses (fp64 scalar with gradient), the sums to log, and PAIR_NUMBERS [B, 5].

    `mean_chosen_tokens` is the GlobalBatch's. The sums to log include the counts that they are averaged by.
    """
    logps = pair_log_probs(
        microbatch, sum_log_probs(microbatch, scores), reference, mean_chosen_tokens=mean_chosen_tokens
    )
    loss_B = loss(logps)
    rewards = loss.rewards(logps)
    sums = pair_statistics(loss_B, rewards, logps.policy) | length_statistics(rewards, logps)
    sums["pairs"] = torch.full((), microbatch.num_pairs, dtype=torch.float64, device=loss_B.device)
    numbers_B5 = torch.cat((logps.policy.columns()[:, :2], reference.columns()[:, :2], loss_B[:, None]), dim=1).detach()
    return loss_B.sum(), sums | token_sums(microbatch, scores), numbers_B5


def token_sums(microbatch: PreferenceBatch, scores: TokenScores) -> dict[str, torch.Tensor]:
    """Sums of TOKEN_STATISTICS over a microbatch's tokens, and the token counts, as fp64 scalars; {} without them."""
    if scores.statistics is None:
        return {}
    is_chosen_N = microbatch.sequence_index_N < microbatch.num_pairs
    values_N = (
        scores.statistics.entropy_N,
        torch.ones_like(is_chosen_N),
        scores.statistics.is_top1_N & is_chosen_N,
        is_chosen_N,
    )
    names = [name for statistic in TOKEN_STATISTICS.items() for name in statistic]
    return {name: value_N.double().sum() for name, value_N in zip(names, values_N, strict=True)}
