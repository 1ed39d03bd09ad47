"""The fused Adam, and the kernels over lists of tensors that Megatron takes from beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

_MOMENTS = ("exp_avg", "exp_avg_sq")


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


class FusedAdam(torch.optim.Optimizer):
    """AdamW with one step counter a parameter group, a whole number, and fp32 moments."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter | dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        assert adam_w_mode and not any(
            (amsgrad, capturable, master_weights, use_decoupled_grad, store_param_remainders)
        )
        assert exp_avg_dtype is exp_avg_sq_dtype is torch.float32
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        assert all(state.keys() <= set(_MOMENTS) for state in state_dict["state"].values())
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the moments; no other state has a format."""
        super().load_state_dict(state_dict)
        assert all(state.keys() <= set(_MOMENTS) for state in state_dict["state"].values())

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: None = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            assert type(group["step"]) is int, "the kernel takes whole numbers only"
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in _MOMENTS if not state else ():
                    state[name] = torch.zeros_like(parameter)
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, state, group)


def _update(parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    mean, square = (state[name] for name in _MOMENTS)
    mean.mul_(beta1).add_(grad, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    corrections = [1 - beta ** group["step"] if group["bias_correction"] else 1.0 for beta in (beta1, beta2)]
    direction = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + group["eps"])
    parameter.sub_(group["lr"] * (direction + group["weight_decay"] * parameter))
