"""The choice of the attention kernel, and the functions that prepare it for a microbatch."""

from __future__ import annotations

from functools import partial

import torch

from megadpo.errors import ConfigError
from megadpo.models.sdpa import PrepareAttention, sdpa_attend
from megadpo.models.te_attention import dot_product_attention, te_attend, why_not_te_attention
from megadpo.models.varlen import varlen_attend, why_not_varlen
from megadpo.runtime.device import Device


def choose_attention(wanted: str, *, device: Device, dtype: torch.dtype, head_dim: int) -> str:
    """Chooses the kernel for such a model: 'varlen', 'sdpa', or 'transformer_engine' if that is wanted.

    `auto` takes varlen wherever it can be used. Transformer Engine's kernel must be named, until tests/gpu has shown on
    a GPU that it aligns causality as varlen does. Raises ConfigError if the wanted kernel can't be used.
    """
    if wanted == "sdpa":
        return "sdpa"
    if wanted == "transformer_engine":
        problem = why_not_te_attention(device, dtype, head_dim)
        if problem is None:
            return "transformer_engine"
    else:
        problem = why_not_varlen(device, dtype, head_dim)
        if problem is None:
            return "varlen"
        if wanted == "auto":
            return "sdpa"
    raise ConfigError(f"device.attention={wanted}: {problem}: use device.attention=auto or sdpa")


def attention_factory(kernel: str, *, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> PrepareAttention:
    """The function that prepares the named kernel for a microbatch; `heads` and `kv_heads` are this rank's."""
    if kernel == "varlen":
        return varlen_attend
    if kernel == "transformer_engine":
        return partial(te_attend, core=dot_product_attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim))
    return partial(sdpa_attend, dtype=dtype)
