"""Directories of safetensors, written as the program writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megadpo.models.conversion.safetensors_writer import BlockWriter, finish_files, lay_out, new_files


def write_safetensors(directory: Path, tensors: Mapping[str, torch.Tensor], *, max_shard_bytes: int = 10**9) -> Path:
    """Writes whole tensors into `directory`, which is made; returns it."""
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    layout = lay_out(specs, max_shard_bytes=max_shard_bytes)
    with new_files(directory, layout):
        with BlockWriter(directory, layout) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        finish_files(directory, layout)
    return directory
