"""A frozen copy of the model that is kept in the host's memory, and on the device only during its pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megadpo.reference.resident import ResidentReference
from megadpo.runtime.device import SideStream, host_copy


class OffloadedReference(ResidentReference):
    """A resident reference whose weights are copied from pinned host memory, and freed after each pass.

    They are only copied to the device, since the host's copy stays valid. Their device memory is what the step before
    has freed, so that it does not add to the peak of the policy's passes.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], *, torch_device: torch.device, follows: bool = False) -> None:
        super().__init__(chunks, torch_device=torch_device, follows=follows)
        self._stream = SideStream(torch_device)
        self._host = [host_copy(parameter.detach()) for parameter in self.parameters()]
        self._is_in = True
        self._drop()

    def prepare(self) -> None:
        """Starts copying the weights to the device; meanwhile the host continues, for instance loading the batch."""
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
        """Keeps the weights on the device for the duration of the context; with `change` they are copied back."""
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
