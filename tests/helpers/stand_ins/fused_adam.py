"""Transformer Engine's FusedAdam in plain torch: its arguments, its states and their formats, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_LARGEST = {torch.float16: 32752.0, torch.uint8: 448.0}
_STORED = {torch.uint8: torch.float8_e4m3fn}


class FusedAdam(torch.optim.Optimizer):
    """AdamW over states in chosen formats, as version 2 of Transformer Engine has it; nothing else is accepted.

    A parameter group has one step counter, a whole number. Main weights are made for every parameter and updated for
    those in a lower format only. fp16 and fp8 (uint8) states have a scale each.
    """

    def __init__(
        self,
        params: Iterable[Any],
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
        unknown = amsgrad or capturable or store_param_remainders or not adam_w_mode
        if unknown or master_weight_dtype is not torch.float32:
            raise NotImplementedError("not made here: fp32 main weights and decoupled decay are")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.dtypes = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": torch.float32,
        }
        self.scales: dict[tuple[torch.Tensor, str], float] = {}

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            self.set_scaled_state(param, name, torch.zeros_like(param, dtype=torch.float32))
        if self.master_weights:
            self.set_scaled_state(param, "master_param", param.detach().clone().float())

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        stored = self.state[param][name]
        if stored.dtype is torch.float32:
            return stored
        return stored.float() * self.scales.get((param, name), 1.0)

    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        if value.dtype is not torch.float32:
            raise AssertionError(f"{name} must be handed over in fp32")
        dtype = self.dtypes[name]
        if dtype in _LARGEST:
            self.scales[param, name] = float(value.abs().max()) / _LARGEST[dtype] or 1.0
            value = value / self.scales[param, name]
        stored = value.to(_STORED.get(dtype, dtype))
        if name in self.state[param]:
            self.state[param][name].copy_(stored)
        else:
            self.state[param][name] = stored.clone()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        state["state"] = {
            index: {name: self.get_unscaled_state(params[index], name) for name in values}
            for index, values in state["state"].items()
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        for index, values in state_dict["state"].items():
            self.state[params[index]] = {}
            for name, value in values.items():
                self.set_scaled_state(params[index], name, value.float())

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: None = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            if type(group["step"]) is not int:
                raise TypeError("the kernel takes a whole number of steps")
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, False)
                grad = param.decoupled_grad if self.use_decoupled_grad else param.grad
                if grad is not None:
                    self._update(param, grad.float(), group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        mean = self.get_unscaled_state(param, "exp_avg").lerp(grad, 1 - beta1)
        square = self.get_unscaled_state(param, "exp_avg_sq").mul(beta2).addcmul(grad, grad, value=1 - beta2)
        self.set_scaled_state(param, "exp_avg", mean)
        self.set_scaled_state(param, "exp_avg_sq", square)
        if group["bias_correction"]:
            mean, square = mean / (1 - beta1**step), square / (1 - beta2**step)
        lower = param.dtype is not torch.float32
        main = self.state[param]["master_param"] if lower and self.master_weights else param
        main -= group["lr"] * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * main)
        if main is not param:
            param.copy_(main)
