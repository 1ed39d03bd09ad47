"""Number format and kind of the layers, from the configuration and what a machine offers."""

from __future__ import annotations

from dataclasses import replace

import torch

from megadpo.config.choices import Backend, Dtype, Fp8Backend
from megadpo.config.schema import Config
from megadpo.models.backend import choose_backend
from megadpo.runtime.device import Device

TORCH_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


def torch_dtype(config: Config) -> torch.dtype:
    """Number format of weights and activations."""
    return TORCH_DTYPES[config.precision.dtype]


def settle_backend(config: Config, device: Device) -> Config:
    """A copy in which precision.backend is the kind of layers of this device; ConfigError as `choose_backend`."""
    return replace(config, precision=replace(config.precision, backend=Backend(layer_backend(config, device))))


def layer_backend(config: Config, device: Device) -> str:
    """The kind of layers that models are made of on this device; ConfigError as `choose_backend`."""
    precision = config.precision
    is_emulated = precision.fp8 is not None and precision.fp8_backend == Fp8Backend.emulate  # in native layers only
    wanted = Backend.native if is_emulated else precision.backend
    return choose_backend(str(wanted), device=device, dtype=torch_dtype(config))
