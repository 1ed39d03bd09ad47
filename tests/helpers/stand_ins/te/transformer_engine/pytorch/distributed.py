"""Names that Megatron imports; nothing here is used without FP8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CudaRNGStatesTracker:
    """Base class of Megatron's wrapper."""


@contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    raise NotImplementedError("recomputing under FP8 is not part of the stand-in")
    yield
