"""What a model is built with besides its architecture and its place in the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megadpo.device import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Settings of a model's construction; what has a default computes the same numbers with any other value.

    `backend` is what `choose_backend` says and `attention` what `choose_attention` says; by default what serves
    everywhere. The head makes logits within `logits_mib` at a time.
    """

    device: Device
    dtype: torch.dtype
    sequence_parallel: bool
    backend: str = "native"
    attention: str = "sdpa"
    logits_mib: int = 128
