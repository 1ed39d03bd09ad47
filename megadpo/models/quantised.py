"""Which linear layers of a built model compute in FP8, and how to have the model without it for a moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.fp8_utils import TE_LINEAR_TYPES
from megatron.core.models.gpt.gpt_model import GPTModel

from megadpo.errors import ConfigError
from megadpo.models.fp8 import Fp8
from megadpo.models.fp8_emulation import EmulatedLinear

# Projections of an attention and of a feed-forward layer.
_LINEARS_OF_A_LAYER = 4


def count_quantised(chunks: Sequence[GPTModel], fp8: Fp8) -> tuple[int, int]:
    """(linear layers of this rank's chunks that compute in FP8, those that the settings say should).

    Raises ConfigError where the two differ: layers without FP8 would train on without a word.
    """
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    covered = [layer for layer in layers if fp8.covers(layer.layer_number - 1, chunks[0].config.num_layers)]
    types: tuple[type, ...] = (EmulatedLinear,) if fp8.emulated else TE_LINEAR_TYPES
    active = fp8.emulated or all(chunk.config.fp8 == fp8.format for chunk in chunks)
    found = sum(isinstance(module, types) for layer in covered for module in layer.modules()) if active else 0
    wanted = _LINEARS_OF_A_LAYER * len(covered)
    if found != wanted:
        raise ConfigError(
            f"precision.fp8={fp8.recipe}: {found} of {wanted} linear layers were built for FP8: Megatron-Core or "
            "Transformer Engine is of a version that this program does not know: use precision.fp8=null"
        )
    return found, _LINEARS_OF_A_LAYER * len(layers)


@contextmanager
def without_fp8(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The chunks compute in their own dtype for the duration of the context."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    emulated = [module for module in modules if isinstance(module, EmulatedLinear)]
    # Megatron asks its configuration in every forward pass.
    formats = [(module.config, module.config.fp8) for module in modules if isinstance(module, GPTModel)]
    try:
        for linear in emulated:
            linear.quantised = False
        for config, _ in formats:
            config.fp8 = None
        yield
    finally:
        for linear in emulated:
            linear.quantised = True
        for config, number_format in formats:
            config.fp8 = number_format
