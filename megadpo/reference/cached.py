"""A reference whose log-probs have been computed before: looked up by what each pair's tokens are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import GlobalBatch
from megadpo.device import to_device
from megadpo.forward_step import SequenceLogProbs


class CachedReference:
    """Answers with the log-probs in `values`, which has those of every pair that it is asked for, by the pair's digest.

    A pair's values are those of SequenceLogProbs' fields, in their order. No model is there, and nothing is sent
    between ranks.
    """

    chunks: Sequence[torch.nn.Module] = ()

    def __init__(self, values: Mapping[bytes, Sequence[float]], *, is_last_stage: bool, device: torch.device) -> None:
        self.values = values
        self.is_last_stage = is_last_stage
        self.device = device

    def prepare(self) -> None:
        """Does nothing: everything is there."""

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """The kept log-probs of this rank's microbatches; [] on all but the last pipeline stage."""
        return [self._look_up(microbatch) for microbatch in batch.microbatches] if self.is_last_stage else []

    def _look_up(self, microbatch: PreferenceBatch) -> SequenceLogProbs:
        known = [self.values[digest] for digest in microbatch.pair_digests]
        logps_4B = np.array(known, np.float64).reshape(-1, 4).T
        return SequenceLogProbs(*to_device(torch.tensor(logps_4B), self.device))

    def device_bytes(self) -> int:
        """None."""
        return 0
