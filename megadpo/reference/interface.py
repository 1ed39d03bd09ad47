"""What a trainer asks of a reference."""

from __future__ import annotations

from typing import Protocol

from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import SequenceLogProbs


class Reference(Protocol):
    """Gives the reference's log-probs of a global batch."""

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """Per-pair log-probs of this rank's microbatches, in their order; [] on all but the last pipeline stage."""
        ...
