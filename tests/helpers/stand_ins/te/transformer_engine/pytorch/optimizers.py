"""The fused Adam, and the kernels over lists of tensors that Megatron takes from beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.helpers.stand_ins import fused_adam


def multi_tensor_applier(op: Callable[..., Any], noop_flag_buffer: torch.Tensor, tensor_lists: Any, *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_scale(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], scale: float
) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert not per_tensor
    norms = [torch.linalg.vector_norm(tensor.float()) for tensor in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms))[None], None


class FusedSGD(torch.optim.Optimizer):
    """A name that Megatron imports."""


class FusedAdam(fused_adam.FusedAdam):
    """Under the name of the package, by which a run says whose Adam it has."""
