"""A frozen copy of the model beside the policy: no gradients, no optimizer state, no gradient buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import SequenceLogProbs, score


class ResidentReference:
    """Scores every batch with its own weights, on the policy's schedule and through the policy's forward path.

    The parameters keep `requires_grad`: for a weight that is frozen by the flag, torch takes another path through the
    matrix product, and the reference would differ from an equal policy by rounding.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], *, device: torch.device) -> None:
        self.chunks = list(chunks)
        self.device = device

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """Per-pair log-probs by a forward-only pass of the batch's schedule."""
        return score(self.chunks, batch, device=self.device)
