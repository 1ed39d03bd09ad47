"""Loads a Hugging Face directory into a sharded Megatron model, and exports one. The only part with communication."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.distributed as dist

from megadpo.errors import ConversionError, listing
from megadpo.models.conversion.families import CHECKPOINT_NAMES, LM_HEAD
from megadpo.models.conversion.mapping import (
    ShardPlan,
    exported_names,
    fill_shard,
    hf_shapes,
    merge_shards,
    shard_plans,
    weight_problems,
)
from megadpo.models.conversion.safetensors_io import FLOAT_DTYPES, SafetensorsReader, TensorHeader
from megadpo.models.conversion.safetensors_writer import BlockWriter, finish_files, lay_out, new_files
from megadpo.models.hf_config import Architecture
from megadpo.runtime.collectives import on_main
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger

_log = get_logger(__name__)

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class _NumberedLayer(Protocol):
    layer_number: int


def check_hf_weights(arch: Architecture, hf_dir: Path | str) -> None:
    """Raises ConversionError unless the files in `hf_dir` hold exactly the weights of `arch`, judged by their headers.

    The error names all tensors that are missing, unexpected, wrongly shaped or quantized, or one damaged file or index.
    It opens every file and reads no weights: call it on one rank before anything that takes long.
    """
    with SafetensorsReader(hf_dir) as reader:
        _check_headers(arch, reader.headers, hf_dir)


def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module], arch: Architecture, hf_dir: Path | str, *, tp_rank: int, tp_size: int
) -> None:
    """Overwrites every parameter of this rank's (unwrapped) GPTModel chunks with the weights in `hf_dir`.

    Values are cast from the file's dtype to the parameter's; vocabulary padding becomes zero. Reads the headers of all
    files and the data of this rank's slices only. Every rank raises the same ConversionError: for the problems of
    `check_hf_weights`, for weights that are NaN or infinite, and for a head that differs from tied embeddings.
    Every rank of the world must call it: one all-gather of the problems that each has found.
    """
    plans = shard_plans(arch, tp_rank=tp_rank, tp_size=tp_size)
    with SafetensorsReader(hf_dir) as reader, torch.no_grad():
        _check_headers(arch, reader.headers, hf_dir)
        warn_of_rounding(
            arch, reader.headers, next(p.dtype for chunk in model_chunks for p in chunk.parameters()), hf_dir
        )
        problems: list[str] = []
        for name, parameter in global_parameters(model_chunks):
            plan = _plan(plans, name, arch)
            fill_shard(plan, partial(read_finite, reader, problems, parameter.dtype), parameter)
            if arch.tied_embeddings and LM_HEAD.name in reader.headers and name == "embedding.word_embeddings.weight":
                problems += unequal_head(plan, reader)
    raise_on_all(problems, f"{hf_dir}: these weights cannot be trained; give other ones")


def export_hf_weights(
    model_chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    out_dir: Path | str,
    *,
    state: ParallelState,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the (unwrapped) model to `out_dir` as Hugging Face safetensors; every rank of the world must call it.

    The weights of data-parallel rank 0 are cast to `dtype` (None keeps the parameters' own), gathered over the tensor
    group one parameter at a time, and sent stage by stage to the main rank, which writes them in table order. Extra
    memory: one parameter twice (its shards and their merger) on tensor rank 0 of each stage. `out_dir` must hold no
    weights yet. Returns on all ranks when the files are complete, or raises the same ConversionError on each.
    """
    mine = dict(global_parameters(model_chunks))
    plans = [shard_plans(arch, tp_rank=rank, tp_size=state.tensor_size) for rank in range(state.tensor_size)]
    stages = _stage_of_each(arch, mine, plans[0], state, dtype)
    layout = lay_out(
        {
            hf_name: (shape, wire_dtype)
            for name, (_, wire_dtype) in stages.items()
            for hf_name, shape in plans[0][name].hf_shapes.items()
        },
        max_shard_bytes=max_shard_bytes,
    )
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(new_files(out_dir, layout)))
        writer = stack.enter_context(BlockWriter(out_dir, layout)) if state.is_main else None
        problems: list[str] = []
        for name, (stage, wire_dtype) in stages.items() if state.data_rank == 0 else ():
            rank_plans = [by_name[name] for by_name in plans]
            merged: dict[str, torch.Tensor] | None = None
            if stage == state.pipeline_rank:
                merged = _gather(rank_plans, mine[name].detach().to(wire_dtype), state, problems)
            if stage != 0 and state.tensor_rank == 0:
                device = next(iter(mine.values())).device
                merged = _to_first_stage(merged, rank_plans[0], stage, wire_dtype, device, state)
            if writer is not None and merged is not None and not problems:
                problems += _write(writer, merged)
        # Raised after the loop: a rank that left it early would leave its peers waiting.
        raise_on_all(problems, f"{out_dir}: the model can't be exported")

        def finish() -> None:
            if writer is not None:
                writer.flush()
            finish_files(out_dir, layout)

        on_main(finish)


def global_parameters(model_chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields every parameter of the chunks, with layers counted over the whole model instead of over the chunk.

    A norm that Transformer Engine keeps inside the following linear layer gets the name of Megatron's own norm.
    """
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            match = _LAYER.match(name)
            if match is not None:
                layer = cast(_NumberedLayer, chunk.get_submodule(match.group().removesuffix(".")))
                inner = name[match.end() :]
                for native, fused in CHECKPOINT_NAMES.items():
                    if inner.startswith(fused):
                        inner = native + inner.removeprefix(fused)
                name = f"decoder.layers.{layer.layer_number - 1}.{inner}"
            yield name, parameter


def _plan(plans: dict[str, ShardPlan], name: str, arch: Architecture) -> ShardPlan:
    if name not in plans:
        raise ConversionError(f"the model's parameter {name} has no row in the table of family {arch.family}")
    return plans[name]


def _check_headers(arch: Architecture, headers: Mapping[str, TensorHeader], hf_dir: Path | str) -> None:
    problems = weight_problems(arch, {name: header.shape for name, header in headers.items()})
    problems += [
        f"{name} has dtype {header.dtype}; quantized weights are not supported, dequantize them first"
        for name, header in headers.items()
        if header.dtype not in FLOAT_DTYPES
    ]
    if problems:
        raise ConversionError(
            f"{hf_dir}: {len(problems)} weights don't fit its config.json; download the model again, or bring the "
            f"config.json that its weights were saved with:\n{listing(problems)}"
        )


def warn_of_rounding(
    arch: Architecture, headers: Mapping[str, TensorHeader], dtype: torch.dtype, hf_dir: Path | str
) -> None:
    stored = [headers[name].dtype for name in hf_shapes(arch)]
    rounded = Counter(name for name in stored if torch.promote_types(FLOAT_DTYPES[name], dtype) is not dtype)
    if rounded:
        _log.warning(
            "%s: %d of %d tensors are stored as %s and are rounded to %s",
            hf_dir,
            rounded.total(),
            len(stored),
            ", ".join(sorted(rounded)),
            str(dtype).removeprefix("torch."),
        )


def read_finite(
    reader: SafetensorsReader, problems: list[str], dtype: torch.dtype, name: str, slices: tuple[slice, ...]
) -> torch.Tensor:
    """Reads a slice of a tensor; adds a line to `problems` if a value is NaN or infinite, or would be in `dtype`."""
    piece = reader.read(name, slices)
    # Minimum and maximum are NaN if any value is; isfinite would take several times the memory and 50 x as long.
    extremes = [abs(extreme.item()) for extreme in torch.aminmax(piece)]
    if not all(math.isfinite(extreme) for extreme in extremes):
        problems.append(f"{name} holds NaN or infinite values")
    elif max(extremes) > torch.finfo(dtype).max:
        problems.append(f"{name} holds values beyond the range of {dtype}; take precision.dtype=fp32 or other weights")
    return piece


def unequal_head(plan: ShardPlan, reader: SafetensorsReader) -> list[str]:
    """A problem if a checkpoint with tied embeddings also has a head, which differs from them in this rank's rows."""
    return [
        f"{LM_HEAD.name} differs from {piece.hf_name} in rows {piece.start}:{piece.stop}, but config.json ties them; "
        "set tie_word_embeddings to false, or remove the tensor that is not used"
        for piece in plan.pieces
        if not torch.equal(
            reader.read(piece.hf_name, plan.slices(piece)), reader.read(LM_HEAD.name, plan.slices(piece))
        )
    ]


def raise_on_all(problems: Sequence[str], what: str) -> None:
    """Raises the same ConversionError on every rank if any rank has found a problem; one all-gather over the world."""
    found: list[Sequence[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, problems)
    every = list(dict.fromkeys(line for lines in found for line in lines))
    if every:
        raise ConversionError(f"{what}:\n{listing(every)}")


def _stage_of_each(
    arch: Architecture,
    mine: dict[str, torch.nn.Parameter],
    plans: dict[str, ShardPlan],
    state: ParallelState,
    dtype: torch.dtype | None,
) -> dict[str, tuple[int, torch.dtype]]:
    """Pipeline stage and output dtype of every exported parameter, in table order; the same on all ranks."""
    held: list[dict[str, torch.dtype]] = [{} for _ in range(state.pipeline_size)]
    dist.all_gather_object(
        held, {name: dtype or parameter.dtype for name, parameter in mine.items()}, group=state.pipeline_group
    )
    owners = {name: [stage for stage, names in enumerate(held) if name in names] for name in exported_names(arch)}
    problems = [f"{name} is on stages {stages} instead of one" for name, stages in owners.items() if len(stages) != 1]
    problems += [f"{name} has no row in the table" for names in held for name in names if name not in plans]
    if problems:
        raise ConversionError(f"the model is not a whole {arch.family} model:\n{listing(problems)}")
    return {name: (stage, held[stage][name]) for name, (stage,) in owners.items()}


def _write(writer: BlockWriter, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Writes whole tensors; returns the problems, [] if there are none."""
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    except ConversionError as error:
        return [str(error)]
    return []


def _gather(
    plans: Sequence[ShardPlan], shard: torch.Tensor, state: ParallelState, problems: list[str]
) -> dict[str, torch.Tensor] | None:
    """Gathers the whole Hugging Face tensors of one parameter on tensor rank 0; returns None on the others.

    Adds a line to `problems` if ranks hold different values of a parameter that should be equal on all.
    """
    shard = shard.contiguous()
    if state.tensor_size == 1:
        return merge_shards(plans, [shard])
    shards = [torch.empty_like(shard) for _ in plans] if state.tensor_rank == 0 else None
    dist.gather(shard, shards, dst=dist.get_global_rank(state.tensor_group, 0), group=state.tensor_group)
    if shards is None:
        return None
    if plans[0].replicated and not all(torch.equal(shards[0], other) for other in shards[1:]):
        problems.append(
            f"{plans[0].megatron_name} differs between tensor-parallel ranks, which must hold the same: training has "
            "gone wrong, and there is no one model to export"
        )
    return merge_shards(plans, shards)


def _to_first_stage(
    merged: dict[str, torch.Tensor] | None,
    plan: ShardPlan,
    stage: int,
    dtype: torch.dtype,
    torch_device: torch.device,
    state: ParallelState,
) -> dict[str, torch.Tensor] | None:
    """Moves one parameter's tensors from `stage` to the first stage and returns them there; None on other stages."""
    if state.pipeline_rank == 0:
        received = {
            name: torch.empty(shape, dtype=dtype, device=torch_device) for name, shape in plan.hf_shapes.items()
        }
        for tensor in received.values():
            dist.recv(tensor, src=dist.get_global_rank(state.pipeline_group, stage), group=state.pipeline_group)
        return received
    if merged is not None:
        for tensor in merged.values():
            dist.send(tensor, dst=dist.get_global_rank(state.pipeline_group, 0), group=state.pipeline_group)
    return None
