"""A frozen copy of the model that waits in the host's memory and is on the device for its pass only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megadpo.reference.resident import ResidentReference
from megadpo.runtime.device import SideStream, host_copy


class OffloadedReference(ResidentReference):
    """A resident reference whose weights come in from pinned host memory and are dropped after each pass.

    They travel to the device only: the host's copy is the truth. Their memory on the device is taken from what the
    step before has given back, so that it does not add to the peak of the policy's passes.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], *, torch_device: torch.device, follows: bool = False) -> None:
        super().__init__(chunks, torch_device=torch_device, follows=follows)
        self._stream = SideStream(torch_device)
        self._host = [host_copy(parameter.detach()) for parameter in self.parameters()]
        self._is_in = True
        self._drop()

    def prepare(self) -> None:
        """Begins to copy the weights in; the host goes on, with loading the batch for instance."""
        if self._is_in:
            return
        for parameter, host in zip(self.parameters(), self._host, strict=True):
            parameter.data = torch.empty_like(host, device=self.torch_device)
        with self._stream.queued(), torch.no_grad():
            for parameter, host in zip(self.parameters(), self._host, strict=True):
                parameter.copy_(host, non_blocking=True)
        self._is_in = True

    @contextmanager
    def weights(self, *, change: bool = False) -> Iterator[None]:
        """The weights are on the device for the duration of the context; with `change` they are copied back after."""
        self.prepare()
        self._stream.join()
        try:
            yield
            if change:
                for parameter, host in zip(self.parameters(), self._host, strict=True):
                    host.copy_(parameter.detach())
        finally:
            self._drop()

    def _drop(self) -> None:
        for parameter in self.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.torch_device)
        self._is_in = False
