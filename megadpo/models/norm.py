"""Root-mean-square norm of the layers.

Legend: T rows of the stream (and heads, if heads are normalised), H normalised size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension that supports sequence parallelism.

    Megatron's WrappedTorchNorm refuses sequence parallelism, although it only needs a mark on the weight, with which
    Megatron sums the weight's gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the normalised input in the same shape and dtype, computed in fp32."""
        if hidden.is_cuda:
            return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        result: torch.Tensor = _RMSNorm.apply(hidden, self.weight, self.eps)
        return result


class _RMSNorm(torch.autograd.Function):
    """rms_norm for CPU, where torch's own consists of a dozen operations and saves a copy of the normalised input."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        x_TH = hidden.reshape(-1, hidden.shape[-1]).float()
        rstd_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True)
        rstd_T1 = rstd_T1.square_().div_(x_TH.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight_H, rstd_T1)
        return (x_TH * rstd_T1).mul_(weight_H).to(hidden.dtype).view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight_H, rstd_T1 = ctx.saved_tensors
        x_TH = hidden.reshape(-1, hidden.shape[-1]).float()
        grad_TH = grads[0].reshape(x_TH.shape).float()
        scale_H = weight_H.float()
        product_TH = grad_TH * x_TH
        grad_weight_H = None
        if ctx.needs_input_grad[1]:
            grad_weight_H = torch.mv(product_TH.t(), rstd_T1.squeeze(1)).to(weight_H.dtype)
        # x · rstd has gradient rstd · (g − x · rstd² · mean(g · x)), where g is the gradient times the weight.
        mean_T1 = torch.mv(product_TH, scale_H)[:, None].div_(x_TH.shape[-1])
        grad_x_TH = torch.mul(grad_TH, scale_H, out=product_TH).mul_(rstd_T1)
        grad_x_TH.addcmul_(x_TH, mean_T1.mul_(rstd_T1**3), value=-1)
        return grad_x_TH.to(hidden.dtype).view(hidden.shape), grad_weight_H, None
