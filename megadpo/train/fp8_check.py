"""The effect of FP8 on preference margins: the same weights score the same pairs with it and without."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import pair_log_probs, score
from megadpo.loss.preference import PreferenceLoss, SequenceLogProbs
from megadpo.metrics.reduction import Metric, Reduction, reduce_metrics
from megadpo.models.quantised import without_fp8
from megadpo.reference import Reference
from megadpo.runtime.collectives import gather_rows
from megadpo.runtime.parallel_state import ParallelState


def margin_errors(
    chunks: Sequence[torch.nn.Module],
    reference: Reference,
    loss: PreferenceLoss,
    batch: GlobalBatch,
    *,
    state: ParallelState,
    torch_device: torch.device,
) -> dict[str, float]:
    """Errors of the batch's reward margins under FP8, on every rank; four forward passes, two without a reference.

    `margin_error` and `margin_error_max` are the mean and the largest |change by FP8| of a pair's reward margin, as the
    loss defines rewards; `policy_margin_error` is the mean of what FP8 in the policy alone changes, of which the
    reference's own error takes a part away. Collectives: those of scoring, and one all-gather.
    """

    def margins(policy: Sequence[SequenceLogProbs], frozen: Sequence[SequenceLogProbs]) -> torch.Tensor:
        # Tensor-parallel ranks have the same log-probs, and stages but the last have none: one speaks.
        return (
            _margins(loss, batch, policy, frozen, torch_device)
            if state.is_last_stage and state.tensor_rank == 0
            else nothing
        )

    nothing = torch.zeros(0)
    policy_in_fp8, frozen_in_fp8 = score(chunks, batch, torch_device=torch_device), reference.log_probs(batch)
    with without_fp8([*chunks, *reference.chunks]):
        policy, frozen = score(chunks, batch, torch_device=torch_device), reference.log_probs(batch)
    exact = margins(policy, frozen)
    errors = (margins(policy_in_fp8, frozen_in_fp8) - exact).abs()
    own_errors = (margins(policy_in_fp8, frozen) - exact).abs()
    reduced = reduce_metrics(
        {
            "pairs": Metric(float(errors.numel()), Reduction.SUM),
            "margin_error": Metric(float(errors.sum()), Reduction.SUM),
            "policy_margin_error": Metric(float(own_errors.sum()), Reduction.SUM),
            "margin_error_max": Metric(float(errors.max()) if errors.numel() else 0.0, Reduction.MAX),
        },
        gather=gather_rows,
        torch_device=torch_device,
    )
    pairs = reduced.pop("pairs")
    largest = reduced.pop("margin_error_max")
    return {name: value / pairs for name, value in reduced.items()} | {"margin_error_max": largest}


def _margins(
    loss: PreferenceLoss,
    batch: GlobalBatch,
    policy: Sequence[SequenceLogProbs],
    reference: Sequence[SequenceLogProbs],
    torch_device: torch.device,
) -> torch.Tensor:
    """Reward margins of all pairs of this rank's microbatches."""
    margins = []
    for microbatch, own, frozen in zip(batch.microbatches, policy, reference, strict=True):
        on_device = microbatch.to(torch_device)
        logps = pair_log_probs(on_device, own, frozen, mean_chosen_tokens=batch.mean_chosen_tokens)
        chosen_B, rejected_B = loss.rewards(logps)
        margins.append(chosen_B - rejected_B)
    return torch.cat(margins)
