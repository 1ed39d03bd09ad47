"""Which weights of a checkpoint differ from those of a Hugging Face directory, value by value."""

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

# Of the same number of bytes as the floats: as numbers -0.0 equals 0.0, and NaN nothing.
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, order=True, slots=True)
class WeightDifference:
    """A Hugging Face tensor that differs: in how many values, and by how much at most."""

    name: str
    values: int
    largest: float


def different_weights(
    arch: Architecture, reader: BoxReader, hf_dir: Path | str, *, stored: torch.dtype, worker: Worker
) -> list[WeightDifference]:
    """The parts of tensors in `hf_dir` that a checkpoint does not hold exactly, of this rank's share; see `sum_up`.

    The files' values are cast to `stored`, the format of the checkpoint's weights, and compared bit by bit. A head that
    lies beside tied embeddings is compared with those. No communication.
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
    """One difference a tensor, by name, from those of its parts."""
    found: dict[str, WeightDifference] = {}
    for part in parts:
        so_far = found.get(part.name, WeightDifference(part.name, 0, 0.0))
        # torch's maximum is NaN where one of them is.
        largest = torch.tensor([so_far.largest, part.largest], dtype=torch.float64).max().item()
        found[part.name] = WeightDifference(part.name, so_far.values + part.values, largest)
    return sorted(found.values())


def _difference(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> list[WeightDifference]:
    """[] where two tensors of one format hold the same bits."""
    bits = _BITS[tensor.element_size()]
    values = int((tensor.view(bits) != expected.view(bits)).sum())
    if values == 0:
        return []
    return [WeightDifference(name, values, float((tensor.float() - expected.float()).abs().max()))]
