"""Megatron as it is where Transformer Engine's FusedAdam is installed."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from megatron.core import optimizer as megatron_optimizer
from megatron.core import utils
from megatron.core.optimizer import distrib_optimizer
from packaging.version import Version

from tests.helpers.stand_ins.fused_adam import FusedAdam

_PARENTS = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")


@contextlib.contextmanager
def fused_adam_installed(seen: dict[str, Any]) -> Iterator[None]:
    """Megatron as it is where Transformer Engine is installed; `seen` gets FusedAdam's arguments and states' bytes."""

    @functools.wraps(FusedAdam.__init__)
    def init(self: FusedAdam, params: Iterable[Any], **options: Any) -> None:
        seen["options"] = options
        original_init(self, params, **options)

    def step(self: FusedAdam, closure: None = None) -> None:
        original_step(self, closure)
        moments = [value for state in self.state.values() for name, value in state.items() if name != "master_param"]
        seen["moment_bytes"] = sum(value.nbytes for value in moments)
        seen["moments"] = sum(value.numel() for value in moments)

    original_init, original_step = FusedAdam.__init__, FusedAdam.step
    modules = {name: ModuleType(name) for name in _PARENTS}
    modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        for owner, name, value in (
            (FusedAdam, "__init__", init),
            (FusedAdam, "step", step),
            (megatron_optimizer, "Adam", FusedAdam),
            (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
            (utils, "get_te_version", lambda: Version("2.8.0")),
            (distrib_optimizer, "Adam", FusedAdam),
            (distrib_optimizer, "HAVE_APEX_OR_TE", True),
            (distrib_optimizer, "USING_TE_OPTIMIZER", True),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
