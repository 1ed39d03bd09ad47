"""Exact preference metrics over a whole validation set: every pair once, under any layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import preference_statistics, run_schedule
from megadpo.loss.logprobs import TokenScores
from megadpo.loss.preference import PreferenceLoss, SequenceLogProbs
from megadpo.metrics.reduction import add_sums
from megadpo.reference import Reference


def evaluate(
    chunks: Sequence[torch.nn.Module],
    reference: Reference,
    loss: PreferenceLoss,
    batches: Iterable[GlobalBatch],
    *,
    torch_device: torch.device,
) -> dict[str, torch.Tensor]:
    """Sums of the logged statistics over this rank's pairs ({} on all but the last pipeline stage); no gradients."""
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        reference_logps = reference.log_probs(batch)

        def closure(
            index: int,
            microbatch: PreferenceBatch,
            scores: TokenScores,
            reference_logps: list[SequenceLogProbs] = reference_logps,
            mean_chosen_tokens: float = batch.mean_chosen_tokens,
        ) -> dict[str, torch.Tensor]:
            return preference_statistics(
                loss, microbatch, scores, reference_logps[index], mean_chosen_tokens=mean_chosen_tokens
            )[1]

        for sums in run_schedule(chunks, batch, closure, torch_device=torch_device, forward_only=True):
            add_sums(total, sums)
    return total
