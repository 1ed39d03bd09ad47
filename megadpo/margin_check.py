"""What FP8 does to preference margins: the same weights score the same pairs with it and without."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import SequenceLogProbs, score
from megadpo.metrics import Metric, Reduction, reduce_metrics
from megadpo.models.quantised import without_fp8
from megadpo.parallel.collectives import gather_rows
from megadpo.parallel.state import ParallelState
from megadpo.reference import Reference


def margin_errors(
    chunks: Sequence[torch.nn.Module],
    reference: Reference,
    batch: GlobalBatch,
    *,
    beta: float,
    state: ParallelState,
    device: torch.device,
) -> dict[str, float]:
    """Errors of the batch's margins under FP8 in units of 1/β, on every rank; four forward passes.

    `margin_error` and `margin_error_max` are the mean and the largest |change of β (Δ policy − Δ reference)| by FP8, Δ
    the log-prob of the chosen response less that of the rejected one; `policy_margin_error` is the mean of the policy's
    alone, of which the reference's own error takes a part away. Collectives: those of scoring, and one all-gather.
    """
    with_fp8 = _margins(score(chunks, batch, device=device)), _margins(reference.log_probs(batch))
    with without_fp8([*chunks, *reference.chunks]):
        without = _margins(score(chunks, batch, device=device)), _margins(reference.log_probs(batch))
    counted = state.is_last_stage and state.tensor_rank == 0  # tensor ranks have the same log-probs: one speaks
    policy, frozen = ((beta * (a - b) if counted else torch.zeros(0)) for a, b in zip(with_fp8, without, strict=True))
    errors = (policy - frozen).abs()
    reduced = reduce_metrics(
        {
            "pairs": Metric(float(errors.numel()), Reduction.SUM),
            "margin_error": Metric(float(errors.sum()), Reduction.SUM),
            "policy_margin_error": Metric(float(policy.abs().sum()), Reduction.SUM),
            "margin_error_max": Metric(float(errors.max()) if errors.numel() else 0.0, Reduction.MAX),
        },
        gather=gather_rows,
        device=device,
    )
    pairs = reduced.pop("pairs")
    largest = reduced.pop("margin_error_max")
    return {name: value / pairs for name, value in reduced.items()} | {"margin_error_max": largest}


def _margins(microbatches: Sequence[SequenceLogProbs]) -> torch.Tensor:
    """Chosen less rejected of all pairs; none on all but the last pipeline stage."""
    if not microbatches:
        return torch.zeros(0)
    return torch.cat([scores.chosen_B - scores.rejected_B for scores in microbatches])
