"""One optimizer step: reference pass, forward-backward schedule, update. The one scaling rule lives here.

The loss of a step is the sum over the pairs of the global batch divided by their number. Each microbatch hands Megatron
(sum of its pairs' losses, its number of pairs); Megatron adds up the counts over microbatches and data-parallel ranks
and divides the summed gradients by them. Nothing else scales anything: a mean over tokens (`sft`) is written as one
over pairs, by the global batch's mean length, which every rank knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer

from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import preference_statistics, run_schedule
from megadpo.loss.logprobs import TokenScores
from megadpo.loss.preference import PreferenceLoss
from megadpo.metrics.reduction import add_sums
from megadpo.models.fp8_emulation import amax_history_restorer
from megadpo.optimizer.guarded_update import Update, guarded_update
from megadpo.reference import Reference
from megadpo.runtime.device import Device, Mark, Span


class RankVotes(NamedTuple):
    """The votes of a rank at the end of a step; every rank gets the largest of each.

    `stop` is 0 to train on, else a number that StopRequests can read. `still_writing` is 1 while the rank writes its
    part of a checkpoint.
    """

    stop: float = 0.0
    still_writing: float = 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sums over this rank's pairs of a step (last stage only), the outcome of its update, and its times.

    `reference_span` marks the reference pass in time, `busy_span` all from there until this rank's gradients are ready
    to be exchanged. `pair_numbers` are PAIR_NUMBERS of each microbatch's pairs, [B, 5] (last stage only).
    """

    sums: dict[str, torch.Tensor]
    update: Update
    reference_span: Span
    busy_span: Span
    pair_numbers: tuple[torch.Tensor, ...] = ()

    @property
    def votes(self) -> RankVotes:
        """The largest of all ranks' votes."""
        return RankVotes(*self.update.votes)


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    reference: Reference,
    loss: PreferenceLoss,
    batch: GlobalBatch,
    *,
    device: Device,
    votes: Callable[[], RankVotes] = RankVotes,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Runs one update on the global batch; the parameter groups' hyperparameters are already set.

    Where the loss or a gradient is not finite on any rank, no rank changes anything, see `guarded_update`; FP8's amax
    histories, where they are emulated, are set back too. `votes` gives this rank's, asked when the step is
    all but done. `before_update` is called when gradients are reduced and every rank has the weights that they were
    computed with.
    """
    reference_started = device.mark()
    reference_logps = reference.log_probs(batch)
    reference_span = (reference_started, device.mark())

    def closure(
        index: int, microbatch: PreferenceBatch, scores: TokenScores
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[dict[str, torch.Tensor], torch.Tensor]]:
        loss_sum, sums, numbers_B5 = preference_statistics(
            loss, microbatch, scores, reference_logps[index], mean_chosen_tokens=batch.mean_chosen_tokens
        )
        pairs = torch.full((), microbatch.num_pairs, dtype=torch.int, device=loss_sum.device)
        return loss_sum.float(), pairs, (sums, numbers_B5)

    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    restore_amax_histories = amax_history_restorer(chunks)
    ready = _mark_ready_gradients(chunks, device)
    per_microbatch = run_schedule(chunks, batch, closure, torch_device=device.torch_device, forward_only=False)
    if before_update is not None:
        before_update()
    total: dict[str, torch.Tensor] = {}
    for sums, _ in per_microbatch:
        add_sums(total, sums)
    # Megatron reads the norm in here, and has read the number of pairs before: a step's only waits for the device.
    update = guarded_update(
        optimizer, loss_sums=[total["loss"]] if total else [], votes=votes, torch_device=device.torch_device
    )
    if update.skipped:
        restore_amax_histories()
    return StepResult(
        sums=total,
        update=update,
        reference_span=reference_span,
        busy_span=(reference_started, ready[0]),
        pair_numbers=tuple(numbers_B5 for _, numbers_B5 in per_microbatch),
    )


def _mark_ready_gradients(chunks: Sequence[DistributedDataParallel], device: Device) -> list[Mark]:
    """A list that the next schedule fills with the moment when the backward is done and the exchange begins."""
    marks: list[Mark] = []

    def finalize(*args: Any, **options: Any) -> None:
        marks.append(device.mark())
        finalize_model_grads(*args, **options)

    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize
    return marks
