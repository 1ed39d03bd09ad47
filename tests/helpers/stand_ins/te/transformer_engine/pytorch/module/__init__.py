"""Layers."""

from . import base
from .layers import GroupedLinear, LayerNormLinear, Linear, RMSNorm

__all__ = ["GroupedLinear", "LayerNormLinear", "Linear", "RMSNorm", "base"]
