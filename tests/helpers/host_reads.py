"""Finds the code that reads a tensor's value on the host: on a GPU it would wait for all work that is queued."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# item(), bool(), float(), int(); results whose shape depends on values; comparisons of whole tensors.
_READING_OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
_READING_METHODS = ("tolist", "numpy", "cpu")
_TORCH = str(Path(torch.__file__).parent) + os.sep


class HostReads(TorchDispatchMode):
    """While entered, collects in `files` the Python file behind every read, the nearest one outside of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []
        self._patches = ExitStack()

    def __enter__(self) -> HostReads:
        for name in _READING_METHODS:
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._noted(name)))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func._opname in ("index", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if func._opname in _READING_OPERATORS or by_mask:
            self._note()
        return func(*args, **(kwargs or {}))

    def _noted(self, name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._note()
            return original(*args, **kwargs)

        return wrapper

    def _note(self) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__:
            assert frame.f_back is not None
            frame = frame.f_back
        self.files.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
