"""Counting the linear layers of a built model that compute in FP8, and switching FP8 off temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.fp8_utils import TE_LINEAR_TYPES, is_first_last_bf16_layer
from megatron.core.models.gpt.gpt_model import GPTModel

from megadpo.errors import ConfigError
from megadpo.models.fp8 import Fp8
from megadpo.models.fp8_emulation import EmulatedLinear

# Projections of an attention and of a feed-forward layer.
_LINEARS_OF_A_LAYER = 4


def count_quantised(chunks: Sequence[GPTModel], fp8: Fp8) -> tuple[int, int]:
    """Returns the number of linear layers of this rank's chunks that compute in FP8, and the number of all of them.

    Raises ConfigError if they are not those that the settings name: layers without FP8 would silently be trained.
    """
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    config = chunks[0].config
    wrong = []
    quantised = 0
    for layer in layers:
        number = layer.layer_number - 1
        found = sum(_in_fp8(module, number, fp8) for module in layer.modules())
        wanted = _LINEARS_OF_A_LAYER if fp8.covers(number, config.num_layers) else 0
        quantised += found
        if found != wanted:
            wrong.append(f"{found} of {wanted} in layer {number}")
    if wrong:
        raise ConfigError(
            f"precision.fp8={fp8.recipe}: other linear layers compute in FP8 than should ({', '.join(wrong)}): "
            "Megatron-Core or Transformer Engine is of a version that this program does not know: use "
            "precision.fp8=null"
        )
    return quantised, _LINEARS_OF_A_LAYER * len(layers)


def _in_fp8(module: torch.nn.Module, layer: int, fp8: Fp8) -> bool:
    """True if a module of the layer, counted from 0 over the model, is a linear layer that computes in FP8."""
    if isinstance(module, EmulatedLinear):
        return module.quantised
    if not isinstance(module, TE_LINEAR_TYPES):
        return False
    config = module.config
    is_set = (config.fp8, config.fp8_recipe) == (fp8.format, fp8.recipe)
    return is_set and not is_first_last_bf16_layer(config, layer)


@contextmanager
def without_fp8(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Has the chunks compute in their own dtype for the duration of the context."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    emulated = [module for module in modules if isinstance(module, EmulatedLinear)]
    # Megatron reads its configuration in every forward pass.
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
