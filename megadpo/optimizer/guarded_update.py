"""An update of the weights that all ranks make, or none does, so that non-finite numbers of a rank reach no weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megadpo.optimizer.build import distributed_optimizers
from megadpo.runtime.collectives import largest_over_ranks
from megadpo.runtime.device import to_device


@dataclass(frozen=True, slots=True)
class Update:
    """Outcome of an update, made or skipped; equal on all ranks.

    `grad_norm` is that of the whole model before clipping; `votes` are the maxima of the ranks' votes; `skipped` is the
    reason in words if the update was skipped, else empty.
    """

    grad_norm: float
    votes: tuple[float, ...]
    skipped: tuple[str, ...]


def guarded_update(
    optimizer: MegatronOptimizer,
    *,
    loss_sums: Sequence[torch.Tensor],
    votes: Callable[[], Sequence[float]],
    torch_device: torch.device,
) -> Update:
    """Updates the weights from reduced gradients, unless a loss or a gradient of any rank is not finite.

    In that case weights, main weights, moments and step counters do not change at all. `loss_sums` are scalars of this
    rank, [] except on the last stage; `votes` returns finite numbers, equally many on every rank. It does what
    Megatron's own step does, which can't be skipped like this for bf16 and fp32, through its public methods, and
    computes no norm twice. One all-reduce over the world for votes and flags is queued before the norm's, so that the
    host waits for the device only once, for the norm.
    """
    optimizer.prepare_grads()
    flags = [_not_finite(loss_sums, torch_device), _not_finite(_gradients_beside_norm(optimizer), torch_device)]
    voted_K = to_device(torch.tensor(votes(), dtype=torch.float64), torch_device)
    heard_K = largest_over_ranks(torch.cat((voted_K, torch.stack(flags))))
    grad_norm = float(optimizer.get_grad_norm())  # read on the host, which waits here
    *agreed, bad_loss, bad_gradient = heard_K.tolist()
    skipped = []
    if bad_loss:
        skipped.append("the loss is not finite")
    if not math.isfinite(grad_norm):
        skipped.append(f"the gradient norm is {grad_norm}")
    if bad_gradient:
        skipped.append("a gradient that the norm leaves out, as it counts another rank's copy, is not finite")
    if not skipped:
        _clip(optimizer, grad_norm)
        optimizer.step_with_ready_grads()
    return Update(grad_norm, tuple(agreed), tuple(skipped))


def _not_finite(tensors: Sequence[torch.Tensor], torch_device: torch.device) -> torch.Tensor:
    """1 if a tensor has a NaN or infinite number, or their norm exceeds fp32; else 0. It is not read on the host."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=torch_device)
    norm = torch.nn.utils.get_total_norm([tensor.detach().float() for tensor in tensors])
    return (~norm.isfinite()).double()


def _gradients_beside_norm(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """This rank's reduced gradients that Megatron's norm leaves out because another rank counts them.

    They are those of norms on all tensor ranks except the first, and of a tied embedding on the last stage.
    """
    beside = []
    for member in distributed_optimizers(optimizer):
        counted = {gradient.data_ptr() for gradient in member.get_main_grads_for_grad_norm()}
        decoupled = member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        gradients = [p.decoupled_grad if decoupled else p.grad for p in member.get_parameters()]
        beside += [g for g in gradients if g is not None and g.data_ptr() not in counted]
    return beside


def _clip(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clips all gradients as Megatron's step does, by a norm that has been computed before."""
    for member in distributed_optimizers(optimizer):
        if parameters := member.get_parameters():
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=member.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
