"""One optimizer step: reference pass, forward-backward schedule, update. The one scaling rule lives here.

The loss of a step is the sum over the pairs of the global batch divided by their number. Each microbatch hands Megatron
(sum of its pairs' losses, its number of pairs); Megatron adds up the counts over microbatches and data-parallel ranks
and divides the summed gradients by them. Nothing else scales anything: a mean over tokens (`sft`) is written as one
over pairs, by the global batch's mean length, which every rank knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import GlobalBatch
from megadpo.device import Device, Mark
from megadpo.forward_step import preference_statistics, run_schedule
from megadpo.logprobs import TokenScores
from megadpo.losses import PreferenceLoss
from megadpo.metrics import add_sums
from megadpo.reference import Reference


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves behind on this rank: sums over its pairs (last stage only), and the step's own numbers.

    `grad_norm` is of the whole model before clipping; `reference_span` marks the reference pass in time.
    """

    sums: dict[str, torch.Tensor]
    grad_norm: float
    reference_span: tuple[Mark, Mark]


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    reference: Reference,
    loss: PreferenceLoss,
    batch: GlobalBatch,
    *,
    device: Device,
) -> StepResult:
    """Runs one update on the global batch; the parameter groups' hyperparameters are already set."""
    reference_started = device.mark()
    reference_logps = reference.log_probs(batch)
    reference_span = (reference_started, device.mark())

    def closure(
        index: int, microbatch: PreferenceBatch, scores: TokenScores
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss_sum, sums = preference_statistics(
            loss, microbatch, scores, reference_logps[index], mean_chosen_tokens=batch.mean_chosen_tokens
        )
        return loss_sum.float(), torch.full((), microbatch.num_pairs, dtype=torch.int, device=loss_sum.device), sums

    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    per_microbatch = run_schedule(chunks, batch, closure, device=device.torch_device, forward_only=False)
    # Megatron reads the norm here in order to clip, and the number of pairs before: a step's only waits for the device.
    _, grad_norm, _ = optimizer.step()
    total: dict[str, torch.Tensor] = {}
    for sums in per_microbatch:
        add_sums(total, sums)
    return StepResult(sums=total, grad_norm=float(grad_norm), reference_span=reference_span)
