"""The interface of a reference for the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import SequenceLogProbs


class Reference(Protocol):
    """Computes or looks up the reference's log-probs of a global batch."""

    @property
    def chunks(self) -> Sequence[torch.nn.Module]:
        """This rank's chunks of the reference model; empty if there is no model."""
        ...

    def prepare(self) -> None:
        """Starts preparations of the next `log_probs` that need no batch, overlapped with other work; optional."""
        ...

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """Log-probs per pair of this rank's microbatches, in their order; [] except on the last pipeline stage."""
        ...

    def device_bytes(self) -> int:
        """Number of bytes of its weights on this rank's device at this moment."""
        ...
