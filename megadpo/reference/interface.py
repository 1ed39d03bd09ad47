"""The interface of a reference to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.loss.preference import SequenceLogProbs


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

    def follow(self, policy: Sequence[torch.nn.Module], mix: float) -> None:
        """Moves each weight by the share `mix` of its way to the policy's; TypeError for one without weights."""
        ...

    def saved(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """The chunks that a checkpoint must hold, on the device for the duration of the context.

        Empty where the weights never change, so that they can be read again from where they came.
        """
        ...

    def device_bytes(self) -> int:
        """Number of bytes of its weights on this rank's device at this moment."""
        ...
