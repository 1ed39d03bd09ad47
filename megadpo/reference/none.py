"""No reference, for losses that only use the policy's log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.loss.preference import SequenceLogProbs


class NoReference:
    """Returns zeros, which such losses ignore."""

    chunks: Sequence[torch.nn.Module] = ()

    def __init__(self, *, is_last_stage: bool, torch_device: torch.device) -> None:
        self.is_last_stage = is_last_stage
        self.torch_device = torch_device

    def prepare(self) -> None:
        """Does nothing."""

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """Zeros for every pair of this rank's microbatches; [] except on the last pipeline stage."""
        if not self.is_last_stage:
            return []
        zeros = [
            torch.zeros(microbatch.num_pairs, dtype=torch.float64, device=self.torch_device)
            for microbatch in batch.microbatches
        ]
        return [SequenceLogProbs(*[zeros_B] * 4) for zeros_B in zeros]

    def follow(self, policy: Sequence[torch.nn.Module], mix: float) -> None:
        """Raises TypeError: there are no weights."""
        raise TypeError(
            "a loss without a reference can't follow the policy: the configuration must refuse reference.sync_every"
        )

    def saved(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """Nothing."""
        return nullcontext(())

    def device_bytes(self) -> int:
        """Zero."""
        return 0
