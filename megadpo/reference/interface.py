"""The interface of a reference to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import SequenceLogProbs


class Reference(Protocol):
    """Gives the reference's log-probs of a global batch."""

    @property
    def chunks(self) -> Sequence[torch.nn.Module]:
        """This rank's chunks of the model that answers; empty where kept numbers do, or none."""
        ...

    def prepare(self) -> None:
        """Begins, beside other work, what the next `log_probs` needs before its batch is known; it may be left out."""
        ...

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """Per-pair log-probs of this rank's microbatches, in their order; [] on all but the last pipeline stage."""
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
        """Bytes that its weights take on this rank's device now."""
        ...
