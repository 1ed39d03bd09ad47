"""Modules of Transformer Engine in plain torch."""

from . import attention, distributed, fp8, module, ops, optimizers, router, tensor
from .attention import DotProductAttention
from .fp8 import fp8_autocast
from .module import GroupedLinear, LayerNormLinear, Linear, RMSNorm
from .utils import get_cudnn_version

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "attention",
    "distributed",
    "fp8",
    "fp8_autocast",
    "get_cudnn_version",
    "module",
    "ops",
    "optimizers",
    "router",
    "tensor",
]
