"""The device a process computes on, and the one place that names torch.cuda.

On CUDA this file only picks the card and the backend. On CPU it lets unmodified Megatron-Core run over gloo: Megatron
asks for CUDA in a handful of ways, and `megatron_on_cpu` answers each of them with its CPU counterpart. Every shim says
what Megatron does, why that breaks on a CPU build of torch, and when it can go. Seen with megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from megadpo.errors import ConfigError

# Factories that Megatron calls with device='cuda': token counts, norms, scalers and communication buffers.
_FACTORIES = ("tensor", "zeros", "empty", "ones", "full")
_TESTED_MEGATRON = ("0.16.1", "0.17")


@dataclass(frozen=True, slots=True)
class Device:
    """Where this process computes: `kind` is 'cuda' or 'cpu', `torch_device` the device of its tensors."""

    kind: str
    torch_device: torch.device

    @property
    def backend(self) -> str:
        """Name of the torch.distributed backend."""
        return "nccl" if self.kind == "cuda" else "gloo"

    def synchronize(self) -> None:
        """Waits for queued work, so that a wall-clock reading means something; nothing to wait for on CPU."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """Peak memory of this process: allocated by torch on CUDA, resident set on CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def select_device(kind: str) -> Device:
    """The device for this process (`auto`: CUDA where there is one); on CUDA card LOCAL_RANK is made current."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        _share_cpu_threads()
        return Device("cpu", torch.device("cpu"))
    if not torch.cuda.is_available():
        raise ConfigError("device.kind=cuda: torch sees no CUDA device. Use device.kind=cpu, or install a CUDA build.")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"--nproc-per-node is larger than the {torch.cuda.device_count()} CUDA devices of this machine "
            f"(LOCAL_RANK={local_rank}). Start one process per device."
        )
    torch.cuda.set_device(local_rank)
    return Device("cuda", torch.device("cuda", local_rank))


def _share_cpu_threads() -> None:
    """Splits the cores over the ranks of this machine; more threads than cores make the ranks fight over them."""
    if "OMP_NUM_THREADS" not in os.environ or "LOCAL_WORLD_SIZE" in os.environ:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))


@contextlib.contextmanager
def megatron_device(device: Device) -> Iterator[None]:
    """Makes Megatron-Core usable on `device` for the duration of the context; changes nothing on CUDA.

    Raises ConfigError when the installed megatron-core is outside the tested range.
    """
    _check_megatron_version()
    if device.kind == "cuda":
        yield
        return
    with contextlib.ExitStack() as stack:
        for patch in (*_cuda_patches(), *_tensor_patches(), *_factory_patches()):
            stack.enter_context(patch)
        # Megatron decorates small functions with torch.compile, which costs minutes of start-up and gains nothing here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_rng_patch())
        yield


def _check_megatron_version() -> None:
    from importlib.metadata import version

    from packaging.version import Version

    found = version("megatron-core")
    low, high = _TESTED_MEGATRON
    if not Version(low) <= Version(found) < Version(high):
        raise ConfigError(
            f"megatron-core {found} is installed; megadpo is tested with >= {low}, < {high}. "
            f"Install one of those: pip install 'megatron-core>={low},<{high}'."
        )


def _cuda_patches() -> list[Any]:
    """Names in torch.cuda that Megatron calls unconditionally. To go when Megatron asks tensors for their device."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return [
        # `device=torch.cuda.current_device()` in p2p, DDP buffers and checkpoint code.
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        # After batched p2p, before checkpoint writes, in timers.
        mock.patch.object(torch.cuda, "synchronize", nothing),
        mock.patch.object(torch.cuda, "empty_cache", nothing),
        # The tensor-parallel RNG tracker keeps and restores generator states.
        mock.patch.object(torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        mock.patch.object(torch.cuda, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        mock.patch.object(torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
    ]


def _tensor_patches() -> list[Any]:
    """Tensor methods: `.cuda()` is the identity; `.type()` answers with CUDA names, which optimizers test for."""
    original: Callable[..., Any] = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return [
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch.Tensor, "type", type_),
    ]


def _factory_patches() -> list[Any]:
    """torch.zeros(..., device='cuda') and its siblings, in schedules, gradient clipping and optimizer scalars."""

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return wrapper

    return [mock.patch.object(torch, name, on_cpu(getattr(torch, name))) for name in _FACTORIES]


@contextlib.contextmanager
def _rng_patch() -> Iterator[None]:
    """Megatron's own setter reaches into torch.cuda.default_generators, which is empty without CUDA."""
    from megatron.core.tensor_parallel import random as megatron_random

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    with (
        mock.patch.object(megatron_random, "_set_cuda_rng_state", set_state),
        mock.patch.object(megatron_random, "_get_cuda_rng_state", get_state),
    ):
        yield
