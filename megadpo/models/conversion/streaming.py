"""Conversion between Hugging Face files and checkpoints, box by box, without building a model and in bounded memory.

Each rank takes its share of the boxes, and each of its threads a share of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megadpo.models.conversion.dcp import BoxReader, LazyBox, save_lazily
from megadpo.models.conversion.families import LM_HEAD
from megadpo.models.conversion.load_save import raise_on_all, read_finite, unequal_head, warn_of_rounding
from megadpo.models.conversion.mapping import fill_shard
from megadpo.models.conversion.safetensors_io import SafetensorsReader
from megadpo.models.conversion.stored import (
    Box,
    HFBlock,
    StoredParameter,
    stored_parameters,
)
from megadpo.models.conversion.threads import ByteBudget, in_threads, split_evenly
from megadpo.models.hf_config import Architecture

# Limit of the memory that a process's threads hold of a checkpoint's boxes; a larger box is held alone.
_HELD_BYTES = 2**29


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One rank of a conversion: its share of the work, its number of threads, and its progress callbacks.

    `begin` is called with the bytes of the share, then `advance` with those of each finished part, from any thread.
    """

    rank: int
    world_size: int
    threads: int
    begin: Callable[[int], None]
    advance: Callable[[int], None]


def store_hf_weights(arch: Architecture, hf_dir: Path, directory: Path, *, dtype: torch.dtype, worker: Worker) -> None:
    """Writes the weights in `hf_dir`, cast to `dtype`, into `directory` as Megatron's distributed files.

    Collective over all ranks, which raise the same ConversionError with the names of weights that are NaN or infinite,
    or would be in `dtype`, and of a head that differs from tied embeddings. The headers must have been checked before.
    """
    problems: list[str] = []
    with SafetensorsReader(hf_dir) as reader:
        if worker.rank == 0:
            warn_of_rounding(arch, reader.headers, dtype, hf_dir)
        boxes = [
            LazyBox(
                key=parameter.key,
                shape=parameter.shape,
                dtype=dtype,
                box=box,
                make=partial(_make, arch, reader, problems, parameter, box, dtype),
            )
            for parameter in stored_parameters(arch)
            for box in parameter.boxes()
        ]
        mine = split_evenly(boxes, worker.world_size, lambda lazy: lazy.nbytes)[worker.rank]
        worker.begin(sum(lazy.nbytes for lazy in mine))
        save_lazily(directory, mine, threads=worker.threads, advance=worker.advance)
    raise_on_all(sorted(problems), f"{hf_dir}: these weights cannot be trained; give other ones")


def _make(
    arch: Architecture,
    reader: SafetensorsReader,
    problems: list[str],
    parameter: StoredParameter,
    box: Box,
    dtype: torch.dtype,
) -> torch.Tensor:
    plan = parameter.plan_of(box)
    values = torch.empty(plan.shape, dtype=dtype)
    fill_shard(plan, partial(read_finite, reader, problems, dtype), values)
    if arch.tied_embeddings and parameter.padded and LM_HEAD.name in reader.headers:
        problems += unequal_head(plan, reader)
    return values.view(box.sizes)


def for_each_stored_block(
    arch: Architecture, reader: BoxReader, work: Callable[[HFBlock], None], *, worker: Worker
) -> None:
    """Calls `work`, in threads, with this rank's share of a checkpoint's weights, as blocks of Hugging Face tensors.

    The checkpoint's tensors must be those of the model (`stored_problems`). Errors of reading are raised. No
    collectives.
    """
    found = reader.tensors()
    parts = [
        (parameter, box)
        for parameter in stored_parameters(arch)
        for box in sorted(found[parameter.key][1])
        if parameter.owns(box)
    ]

    def nbytes(part: tuple[StoredParameter, Box]) -> int:
        return reader.nbytes(part[0].key, part[1])

    budget = ByteBudget(_HELD_BYTES)

    def run(_: int, items: Iterator[tuple[StoredParameter, Box]]) -> None:
        for part in items:
            parameter, box = part
            with budget.hold(2 * nbytes(part)):
                for block in parameter.hf_blocks(box, reader.read(parameter.key, box)):
                    work(block)
            worker.advance(nbytes(part))

    mine = split_evenly(parts, worker.world_size, nbytes)[worker.rank]
    worker.begin(sum(map(nbytes, mine)))
    in_threads(run, [items for items in split_evenly(mine, worker.threads, nbytes) if items])
