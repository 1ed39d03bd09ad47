"""Megatron's optimizer for parameters whose states lie in the host's memory, mended."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

_PLACEMENT = (
    "offload_fraction",
    "cpu_optimizer_cls",
    "gpu_optimizer_cls",
    "param_update_in_fp32",
    "pin_cpu_grads",
    "pin_cpu_params",
    "overlap_cpu_optimizer_d2h_h2d",
)


class HostOptimizer(HybridDeviceOptimizer):
    """HybridDeviceOptimizer (megatron-core 0.16) that goes on from a checkpoint as if it had never stopped.

    It keeps an optimizer of its own for each place (`sub_optimizers`) over inner parameters: fp32 copies, on the host
    for the share that is offloaded. Each method says what goes wrong in Megatron's; all go when it doesn't.
    """

    def allocate(self) -> None:
        """Gives every inner parameter zero moments, and a step counter where the optimizer keeps them by parameter.

        Megatron's `dummy_step` makes a random update of the weights for that.
        """
        for optimizer in self.sub_optimizers:
            counts_by_parameter = isinstance(optimizer, torch.optim.AdamW)
            for group in optimizer.param_groups:
                for inner in group["params"]:
                    optimizer.state[inner] = {"exp_avg": torch.zeros_like(inner), "exp_avg_sq": torch.zeros_like(inner)}
                    if counts_by_parameter:
                        optimizer.state[inner]["step"] = torch.zeros((), dtype=torch.float32, device=inner.device)
        self._sync_sub_optimizers_state_to_hdo()

    def state_dict(self) -> dict[str, Any]:
        """What torch says of an optimizer, without where it works.

        Megatron's groups name classes: a checkpoint of them can be written, and not be read again.
        """
        state: dict[str, Any] = super().state_dict()
        for group in state["param_groups"]:
            for setting in _PLACEMENT:
                group.pop(setting, None)
        return state

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Hands loaded states on, and forgets the loaded step.

        Megatron's would set it again before every update, where an optimizer counts by groups: it would stand still.
        """
        super()._sync_hdo_state_to_sub_optimizers()
        for group in self.param_groups:
            group.pop("step", None)

    def _move_new_state_to_right_device(self) -> None:
        """Gives loaded moments and counters memory of their own beside their inner parameter.

        Megatron's keeps the whole loaded tensors alive, of which a data-parallel rank needs a slice.
        """
        for optimizer in self.sub_optimizers:
            for inner, state in optimizer.state.items():
                for name in state.keys() - {"master_param"}:
                    state[name] = state[name].to(inner.device, copy=True)
