"""FP8's context: while it is on, linear layers round what goes into them, every tensor by its own largest value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformer_engine.common import recipe


class FP8GlobalStateManager:
    """Whether FP8 is on."""

    enabled = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    assert not calibrating
    if enabled and not isinstance(fp8_recipe, recipe.Float8CurrentScaling):
        raise NotImplementedError("the stand-in for Transformer Engine computes Float8CurrentScaling only")
    before, FP8GlobalStateManager.enabled = FP8GlobalStateManager.enabled, enabled
    try:
        yield
    finally:
        FP8GlobalStateManager.enabled = before
