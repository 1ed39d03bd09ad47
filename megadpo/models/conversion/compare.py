"""Compares the weights of a checkpoint with those of a Hugging Face directory, value by value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megadpo.models.conversion.dcp import BoxReader
from megadpo.models.conversion.families import EMBEDDING, LM_HEAD
from megadpo.models.conversion.safetensors_io import SafetensorsReader
from megadpo.models.conversion.stored import HFBlock
from megadpo.models.conversion.streaming import Worker, for_each_stored_block
from megadpo.models.hf_config import Architecture

# Integers of the floats' sizes, to compare bits: as numbers -0.0 equals 0.0, and NaN differs from itself.
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, order=True, slots=True)
class WeightDifference:
    """A Hugging Face tensor that differs, with the number of different values and the largest difference."""

    name: str
    values: int
    largest: float


def different_weights(
    arch: Architecture, reader: BoxReader, hf_dir: Path | str, *, stored: torch.dtype, worker: Worker
) -> list[WeightDifference]:
    """Returns the parts of tensors in `hf_dir`, in this rank's share, that differ from the checkpoint's.

    The files' values are cast to `stored`, the format of the checkpoint's weights, and compared bit by bit. A head
    stored in addition to tied embeddings is compared with those. No communication; see `sum_up`.
    """
    different: list[WeightDifference] = []
    with SafetensorsReader(hf_dir) as theirs:

        def compare(block: HFBlock) -> None:
            names = [block.name]
            if arch.tied_embeddings and block.name == EMBEDDING.name and LM_HEAD.name in theirs.headers:
                names.append(LM_HEAD.name)
            ours = block.values.to(stored)
            for name in names:
                different.extend(_difference(name, ours, theirs.read(name, block.slices).to(stored)))

        for_each_stored_block(arch, reader, compare, worker=worker)
    return different


def sum_up(parts: Iterable[WeightDifference]) -> list[WeightDifference]:
    """Merges the differences of a tensor's parts into one per tensor, sorted by name."""
    found: dict[str, WeightDifference] = {}
    for part in parts:
        so_far = found.get(part.name, WeightDifference(part.name, 0, 0.0))
        # torch's maximum is NaN if any value is.
        largest = torch.tensor([so_far.largest, part.largest], dtype=torch.float64).max().item()
        found[part.name] = WeightDifference(part.name, so_far.values + part.values, largest)
    return sorted(found.values())


def _difference(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> list[WeightDifference]:
    """Compares two tensors of one format bit by bit; [] if they are equal."""
    bits = _BITS[tensor.element_size()]
    values = int((tensor.view(bits) != expected.view(bits)).sum())
    if values == 0:
        return []
    return [WeightDifference(name, values, float((tensor.float() - expected.float()).abs().max()))]
