"""A frozen copy of the model beside the policy: no gradients, no optimizer state, no gradient buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from megadpo.data.loader import GlobalBatch
from megadpo.forward_step import score
from megadpo.loss.preference import SequenceLogProbs


class ResidentReference:
    """Scores every batch with its own weights, by the policy's schedule and forward path.

    The parameters keep `requires_grad`: without it torch computes the matrix product differently, and the reference
    would differ from an equal policy by rounding.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], *, torch_device: torch.device, follows: bool = False) -> None:
        """`follows`: its weights move towards the policy's in the course of the run (TR-DPO)."""
        self.chunks = list(chunks)
        self.torch_device = torch_device
        self.follows = follows

    def prepare(self) -> None:
        """Does nothing, since the weights are on the device."""

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """Log-probs per pair, by a forward-only pass of the batch's schedule."""
        with self.weights():
            return score(self.chunks, batch, torch_device=self.torch_device)

    def weights(self, *, change: bool = False) -> AbstractContextManager[None]:
        """Has the weights on the device for the duration of the context; with `change` changes to them are kept."""
        return nullcontext()

    def follow(self, policy: Sequence[torch.nn.Module], mix: float) -> None:
        """Moves each weight by the share `mix` of its way to that of `policy`, chunks of the same shapes and layout.

        TR-DPO's soft update (Gorbatovski et al. 2024, eq. 6), a hard one with mix 1. Computed in fp32.
        """
        with self.weights(change=True), torch.no_grad():
            theirs = (parameter for chunk in policy for parameter in chunk.parameters())
            for parameter, target in zip(self.parameters(), theirs, strict=True):
                parameter.copy_(torch.lerp(parameter.float(), target.float(), mix))

    @contextmanager
    def saved(self) -> Iterator[Sequence[torch.nn.Module]]:
        """The chunks of a reference that follows the policy, on the device for the duration of the context; else ()."""
        if not self.follows:
            yield ()
            return
        with self.weights():
            yield self.chunks

    def device_bytes(self) -> int:
        """Number of bytes of the parameters on the device."""
        return sum(parameter.untyped_storage().nbytes() for parameter in self.parameters())

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yields the parameters of all chunks, without repetition."""
        return (parameter for chunk in self.chunks for parameter in chunk.parameters())
