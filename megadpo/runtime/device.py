"""The device a process computes on, and the one place that names torch.cuda.

On CUDA this file only picks the GPU and the backend. On CPU it lets unmodified Megatron-Core run over gloo: Megatron
asks for CUDA in a handful of ways, and `megatron_device` answers each of them with its CPU counterpart. Every shim says
what Megatron does, why that breaks on a CPU build of torch, and when it can go. Seen with megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias
from unittest import mock

import torch

from megadpo.errors import ConfigError
from megadpo.runtime.cpus import usable_cpus
from megadpo.runtime.gloo import megatron_over_gloo
from megadpo.runtime.gpus import GPUS, find_gpu
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

# Factories that Megatron calls with device='cuda': token counts, norms, scalers and communication buffers.
_FACTORIES = ("tensor", "zeros", "empty", "ones", "full")
_TESTED_MEGATRON = ">=0.16.1,<0.17"


Mark: TypeAlias = "float | torch.cuda.Event"
Span: TypeAlias = tuple[Mark, Mark]


@dataclass(frozen=True, slots=True)
class Device:
    """The device that this process computes on: `kind` is 'cuda' or 'cpu', `torch_device` is that of its tensors."""

    kind: str
    torch_device: torch.device

    @property
    def backend(self) -> str:
        """Name of the torch.distributed backend."""
        return "nccl" if self.kind == "cuda" else "gloo"

    def mark(self) -> Mark:
        """Marks a point in the device's queue of work, without waiting for it."""
        if self.kind == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def seconds_between(self, start: Mark, end: Mark) -> float:
        """Seconds from one mark to a later one; waits until the device has reached the later one."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return start.elapsed_time(end) / 1000.0
        assert isinstance(start, float) and isinstance(end, float)
        return end - start

    def compute_capability(self) -> tuple[int, int]:
        """(major, minor) of the CUDA device."""
        return torch.cuda.get_device_capability(self.torch_device)

    def peak_memory_bytes(self) -> int:
        """Peak memory of this process: allocated by torch on CUDA, resident set on CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def release_cached_memory(self) -> None:
        """Frees the CUDA memory that torch caches for future tensors."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def memory_gib(self) -> float | None:
        """Total memory of the CUDA device in GiB, used or not; None on CPU."""
        if self.kind == "cpu":
            return None
        return torch.cuda.get_device_properties(self.torch_device).total_memory / 2**30

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """FLOP/s of dense matrix products in `dtype` by the GPU's data sheet; None on CPU.

        Also None, with a line in the log, for a GPU that is not in the table, and for all dtypes except bf16.
        """
        if self.kind == "cpu":
            return None
        name = torch.cuda.get_device_name(self.torch_device)
        known = find_gpu(name)
        if known is None or dtype is not torch.bfloat16:
            logger.warning(
                "throughput/mfu is left out: no peak rate is known for %s in %s (known: bf16 on %s)",
                name,
                str(dtype).removeprefix("torch."),
                ", ".join(" ".join(gpu.words) for gpu in GPUS.values()),
            )
            return None
        return known[1].bf16_tflops * 1e12

    def gpu_name(self) -> str | None:
        """Name of the CUDA device in the table of GPUs; None on CPU and for a GPU that is not in the table."""
        known = find_gpu(torch.cuda.get_device_name(self.torch_device)) if self.kind == "cuda" else None
        return None if known is None else known[0]


def planning_device() -> Device:
    """A CPU device whose tensors are meta tensors, so that computing on it takes no memory and hardly any time."""
    return Device("cpu", torch.device("meta"))


def to_device(tensor: torch.Tensor, torch_device: torch.device) -> torch.Tensor:
    """Copies a CPU tensor to `torch_device`; to CUDA from pinned memory, since other copies wait for queued work."""
    return (
        tensor.pin_memory().to(torch_device, non_blocking=True)
        if torch_device.type == "cuda"
        else tensor.to(torch_device)
    )


def host_copy(tensor: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """Copies a tensor to host memory, pinned if it comes from CUDA so that copying back can overlap with other work.

    `into`, an earlier copy that is not needed any more, is overwritten if shape and dtype fit, which is faster than
    allocating. Raises MemoryError if there is not enough memory.
    """
    if into is None or (into.shape, into.dtype) != (tensor.shape, tensor.dtype):
        try:
            into = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        except RuntimeError as error:  # torch's allocators raise it, that of pinned memory as a CUDA error
            raise MemoryError(str(error).partition("\n")[0]) from error
    return into.copy_(tensor)


class SideStream:
    """A CUDA stream beside the current one; on CPU its work is done at once."""

    def __init__(self, torch_device: torch.device) -> None:
        self._stream = torch.cuda.Stream(torch_device) if torch_device.type == "cuda" else None

    @contextlib.contextmanager
    def queued(self) -> Iterator[None]:
        """Queues the context's work on this stream, to start when all work queued before is done."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Has the device's further work wait for what is queued here; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def select_device(kind: str) -> Device:
    """Selects the device of this process (`auto`: CUDA if there is one).

    On CUDA, device number LOCAL_RANK becomes the current one; on CPU, torch's threads are split over the ranks of this
    machine.
    """
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
    """Splits the usable CPUs over the ranks of this machine; more threads than CPUs would slow the ranks down.

    OMP_NUM_THREADS is honoured, except for a 1 under a launcher: torchrun sets it to 1 where the user has not set it.
    """
    said = os.environ.get("OMP_NUM_THREADS")
    if said is None or (said == "1" and "LOCAL_WORLD_SIZE" in os.environ):
        torch.set_num_threads(max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextlib.contextmanager
def megatron_device(device: Device) -> Iterator[None]:
    """Makes Megatron-Core usable on `device` for the duration of the context; changes nothing on CUDA.

    Tensors that Megatron creates on CUDA are created on `device`, which may be `planning_device()`.
    Raises ConfigError if the installed megatron-core is outside the tested range.
    """
    _check_megatron_version()
    if device.kind == "cuda":
        yield
        return
    if device.torch_device.type != "meta":  # a plan creates no optimizer
        _check_torch_optimizer()
    with contextlib.ExitStack() as stack:
        for patch in (*_cuda_patches(device.torch_device), *_tensor_patches(), *_factory_patches(device.torch_device)):
            stack.enter_context(patch)
        # Megatron decorates small functions with torch.compile, which costs minutes of start-up and gains nothing here.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_rng_patch())
        stack.enter_context(_weight_gradient_patch())
        stack.enter_context(megatron_over_gloo())
        yield


def _check_megatron_version() -> None:
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    found = version("megatron-core")
    if not SpecifierSet(_TESTED_MEGATRON).contains(found, prereleases=True):
        raise ConfigError(
            f"megatron-core {found} is installed; megadpo is tested with {_TESTED_MEGATRON}. "
            f"Install one of those: pip install 'megatron-core{_TESTED_MEGATRON}'."
        )


def _check_torch_optimizer() -> None:
    """Raises ConfigError on CPU if Megatron has bound CUDA kernels of Transformer Engine or apex at its import."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    if HAVE_APEX_OR_TE:
        raise ConfigError(
            "device.kind=cpu: Transformer Engine or apex is installed, and Megatron-Core then uses their optimizer, "
            "which needs CUDA. Use device.kind=cuda, or an environment without them (make venv makes one)."
        )


def _cuda_patches(torch_device: torch.device) -> list[Any]:
    """Patches names in torch.cuda that Megatron calls unconditionally, until Megatron asks tensors for their device."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return [
        # `device=torch.cuda.current_device()` in p2p, DDP buffers and checkpoint code.
        mock.patch.object(torch.cuda, "current_device", lambda: torch_device),
        # After batched p2p, before checkpoint writes, in timers.
        mock.patch.object(torch.cuda, "synchronize", nothing),
        mock.patch.object(torch.cuda, "empty_cache", nothing),
        # The tensor-parallel RNG tracker keeps and restores generator states.
        mock.patch.object(torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        mock.patch.object(torch.cuda, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        mock.patch.object(torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
    ]


def _tensor_patches() -> list[Any]:
    """Patches tensor methods: `.cuda()` is the identity; `.type()` returns CUDA names, which optimizers test for."""
    original: Callable[..., Any] = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return [
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch.Tensor, "type", type_),
    ]


def _factory_patches(torch_device: torch.device) -> list[Any]:
    """Patches torch.zeros(..., device='cuda') and the like, in schedules, gradient clipping and optimizer scalars."""

    def on_device(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
                kwargs["device"] = torch_device
            return factory(*args, **kwargs)

        return wrapper

    return [mock.patch.object(torch, name, on_device(getattr(torch, name))) for name in _FACTORIES]


@contextlib.contextmanager
def _rng_patch() -> Iterator[None]:
    """Patches Megatron's RNG setter, which indexes torch.cuda.default_generators, an empty list without CUDA."""
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


class _WeightGradientKernels:
    """CPU counterpart of Megatron's CUDA extension `fused_weight_gradient_mlp_cuda`."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_outputs: torch.Tensor, main_grad: torch.Tensor) -> None:
        """Adds grad_outputsᵀ · inputs into `main_grad`."""
        if inputs.dtype is main_grad.dtype:
            main_grad.addmm_(grad_outputs.t(), inputs)
        else:
            main_grad += grad_outputs.t() @ inputs

    @staticmethod
    def wgrad_gemm_accum_fp16(inputs: torch.Tensor, grad_outputs: torch.Tensor, main_grad: torch.Tensor) -> None:
        """The same into a `main_grad` of the model's own format, fp16 or bf16."""
        main_grad.addmm_(grad_outputs.t(), inputs)


@contextlib.contextmanager
def _weight_gradient_patch() -> Iterator[None]:
    """Patches in the extension with which Megatron adds weight gradients to its buffer inside the matrix product.

    Without it every microbatch creates a gradient of every weight and adds it to the buffer afterwards.
    """
    from megatron.core.tensor_parallel import layers

    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", _WeightGradientKernels, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
    ):
        yield
