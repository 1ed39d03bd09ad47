"""A CPU that takes its memory for two: the device's, and the host's, where pinned tensors lie."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from tests.helpers.stand_ins.fused_adam_installed import fused_adam_installed


class _HostTensor(torch.Tensor):
    """A tensor in the host's memory; copies of it are too."""


class _Event:
    """Work that is done already."""

    def synchronize(self) -> None:
        pass

    def wait(self, stream: object) -> None:
        pass


class _Stream:
    """A queue without work."""

    def wait_stream(self, other: _Stream) -> None:
        pass

    def record_event(self) -> _Event:
        return _Event()


@contextlib.contextmanager
def host_memory_apart(seen: dict[str, Any]) -> Iterator[None]:
    """Megatron's HybridDeviceOptimizer works: all but pinned tensors say that they are on CUDA, for FusedAdam.

    `seen` gets the numbers of parameters on either side, and how many optimizers of the host there are.
    """
    choose = HybridDeviceOptimizer._get_sub_optimizer_param_groups
    build = HybridDeviceOptimizer._init_sub_optimizers

    def choose_apart(self: HybridDeviceOptimizer, fraction: float) -> Any:
        self.pin_cpu_grads = False  # a CPU build of torch can't
        with (
            mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: not isinstance(tensor, _HostTensor))),
            mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor.as_subclass(_HostTensor)),
        ):
            return choose(self, fraction)

    def build_apart(self: HybridDeviceOptimizer) -> None:
        build(self)
        sides = {"host": self.cpu_param_groups, "device": self.gpu_param_groups}
        for side, groups in sides.items():
            seen[side] = sum(parameter.numel() for group in groups for parameter in group["params"])
        seen["host_optimizers"] = len(self.cpu_optimizers)

    with contextlib.ExitStack() as stack:
        stack.enter_context(fused_adam_installed({}))
        for owner, name, value in (
            (HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", choose_apart),
            (HybridDeviceOptimizer, "_init_sub_optimizers", build_apart),
            (torch.cuda, "current_stream", _Stream),
            (torch.cuda, "Stream", _Stream),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
