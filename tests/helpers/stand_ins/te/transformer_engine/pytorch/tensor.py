"""The class by which Megatron tells quantised parameters from others: no parameter here is one."""

from __future__ import annotations


class QuantizedTensor:
    """Base of FP8 tensors."""
