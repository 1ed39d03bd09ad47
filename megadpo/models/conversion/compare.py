"""Which weights of a model differ from those of a Hugging Face directory, value by value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megadpo.models.conversion.load_save import global_parameters
from megadpo.models.conversion.mapping import merge_shards, shard_plans
from megadpo.models.conversion.safetensors_io import SafetensorsReader
from megadpo.models.hf_config import Architecture


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

    The files' values are cast to `stored`, the format that the chunks' weights once had. Holds one parameter and its
    Hugging Face tensors besides the model; calls `advance` after each. No communication.
    """
    plans = shard_plans(arch, tp_rank=0, tp_size=1)
    different = []
    with SafetensorsReader(hf_dir) as reader, torch.no_grad():
        for megatron_name, parameter in global_parameters(chunks):
            for name, tensor in merge_shards([plans[megatron_name]], [parameter.cpu()]).items():
                expected = reader.read(name).to(stored).to(tensor.dtype)
                if not torch.equal(tensor, expected):
                    distance = (tensor.float() - expected.float()).abs()
                    values = int((tensor != expected).sum())
                    different.append(WeightDifference(name, values, float(distance.max())))
            advance()
    return different
