"""A reference whose log-probs have been computed before, and are looked up by a hash of each pair's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import GlobalBatch
from megadpo.loss.preference import SequenceLogProbs
from megadpo.reference.store import LogProbs
from megadpo.runtime.device import to_device


class CachedReference:
    """Returns the cached log-probs of each pair by its digest; all pairs it is asked for must be cached.

    It has no model, and the ranks do not communicate.
    """

    chunks: Sequence[torch.nn.Module] = ()

    def __init__(
        self, digests: Sequence[bytes], logps_n4: LogProbs, *, is_last_stage: bool, torch_device: torch.device
    ) -> None:
        """`logps_n4` are the pairs' SequenceLogProbs, fp64, with a column per field."""
        # Arrays, because every rank has them: they take a tenth of the memory of objects.
        unsorted_n = _as_array(digests)
        order_n = np.argsort(unsorted_n)
        self._digests_n = unsorted_n[order_n]
        self._logps_n4 = logps_n4[order_n]
        self.is_last_stage = is_last_stage
        self.torch_device = torch_device

    def prepare(self) -> None:
        """Does nothing, since everything is in memory."""

    def kept(self, digests: Sequence[bytes]) -> LogProbs:
        """Returns the cached log-probs of the pairs, fp64 [n, 4]; KeyError if one is missing."""
        wanted_n = _as_array(digests)
        places_n = np.searchsorted(self._digests_n, wanted_n).clip(max=max(0, len(self._digests_n) - 1))
        if len(wanted_n) and not (self._digests_n[places_n] == wanted_n).all():
            raise KeyError("a pair without kept log-probs")
        return self._logps_n4[places_n]

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """The cached log-probs of this rank's microbatches; [] except on the last pipeline stage."""
        return [self._look_up(microbatch) for microbatch in batch.microbatches] if self.is_last_stage else []

    def _look_up(self, microbatch: PreferenceBatch) -> SequenceLogProbs:
        logps_B4 = torch.from_numpy(self.kept(microbatch.pair_digests))
        return SequenceLogProbs.of_columns(to_device(logps_B4, self.torch_device))

    def follow(self, policy: Sequence[torch.nn.Module], mix: float) -> None:
        """Raises TypeError: there are no weights."""
        raise TypeError("stored log-probs can't follow the policy: the configuration must refuse reference.sync_every")

    def saved(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """Nothing."""
        return nullcontext(())

    def device_bytes(self) -> int:
        """Zero."""
        return 0


def _as_array(digests: Sequence[bytes]) -> npt.NDArray[np.bytes_]:
    return np.array(digests, dtype="S16")
