"""Which weights of a model differ from those of a Hugging Face directory, value by value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megadpo.models.conversion.families import LM_HEAD
from megadpo.models.conversion.load_save import global_parameters
from megadpo.models.conversion.mapping import merge_shards, shard_plans
from megadpo.models.conversion.safetensors_io import SafetensorsReader
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
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    hf_dir: Path | str,
    *,
    stored: torch.dtype,
    advance: Callable[[], None],
) -> list[WeightDifference]:
    """The tensors in `hf_dir` that this rank's (unwrapped, not tensor-parallel) chunks don't hold exactly.

    The files' values are cast to `stored`, the format that the chunks' weights once had, and compared bit by bit. A
    head that lies beside tied embeddings is compared with those. Holds one parameter and its Hugging Face tensors
    besides the model; calls `advance` after each. No communication.
    """
    plans = shard_plans(arch, tp_rank=0, tp_size=1)
    different: list[WeightDifference] = []
    with SafetensorsReader(hf_dir) as reader, torch.no_grad():
        for megatron_name, parameter in global_parameters(chunks):
            tensors = merge_shards([plans[megatron_name]], [parameter.cpu()])
            if megatron_name == "embedding.word_embeddings.weight" and arch.tied_embeddings:
                (embedding,) = tensors.values()
                tensors |= {LM_HEAD.name: embedding} if LM_HEAD.name in reader.headers else {}
            for name, tensor in tensors.items():
                different += _difference(name, tensor, reader.read(name).to(stored).to(tensor.dtype))
            advance()
    return different


def _difference(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> list[WeightDifference]:
    """[] where two tensors of one format hold the same bits."""
    bits = _BITS[tensor.element_size()]
    values = int((tensor.view(bits) != expected.view(bits)).sum())
    if values == 0:
        return []
    return [WeightDifference(name, values, float((tensor.float() - expected.float()).abs().max()))]
