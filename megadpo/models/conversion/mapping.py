"""Mapping between slices of Hugging Face tensors and tensor-parallel shards: pure arithmetic, in both directions.

Both directions use one `ShardPlan`: `fill_shard` copies its pieces into the shard, `merge_shards` copies them out
of all the ranks' shards, so Hugging Face → Megatron → Hugging Face is bit-equal by construction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from megadpo.errors import ConversionError
from megadpo.models.conversion.families import FAMILIES, LM_HEAD, Axis, HFTensor, Split, WeightRow

if TYPE_CHECKING:
    from megadpo.models.hf_config import Architecture


@dataclass(frozen=True)
class Piece:
    """The slice `start:stop` of one Hugging Face tensor along the plan's axis, whole along the other."""

    hf_name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One Megatron parameter on one tensor-parallel rank: pieces concatenated along `axis`, then zeros."""

    megatron_name: str
    shape: tuple[int, ...]
    axis: int
    pieces: tuple[Piece, ...]
    hf_shapes: Mapping[str, tuple[int, ...]]
    replicated: bool

    def slices(self, piece: Piece) -> tuple[slice, ...]:
        """Index of `piece` within its Hugging Face tensor."""
        return (slice(None),) * self.axis + (slice(piece.start, piece.stop),)


def weight_rows(arch: Architecture) -> Iterator[tuple[WeightRow, str, int]]:
    """Yields (row, Megatron name, global layer) of all parameters in table order; layer 0 for those outside the layers.

    Names are global: `decoder.layers.{i}` counts over the whole model, not over one pipeline stage.
    """
    rows = [row for row in FAMILIES[arch.family].rows if row.when(arch)]
    in_layer = [row for row in rows if "{layer}" in row.megatron]
    first = rows.index(in_layer[0])
    for row in rows[:first]:
        yield row, row.megatron, 0
    for layer in range(arch.num_layers):
        for row in in_layer:
            yield row, row.megatron.format(layer=layer), layer
    for row in rows[first + len(in_layer) :]:
        yield row, row.megatron, 0


def shard_plans(arch: Architecture, *, tp_rank: int, tp_size: int) -> dict[str, ShardPlan]:
    """Plans of all parameters of the model on one tensor-parallel rank, by global Megatron name, in table order."""
    _check_divisible(arch, tp_size)
    return {
        name: _shard_plan(arch, row, name, layer, tp_rank=tp_rank, tp_size=tp_size)
        for row, name, layer in weight_rows(arch)
    }


def exported_names(arch: Architecture) -> list[str]:
    """Global Megatron names of all parameters that an export writes, without repetition, in table order."""
    return [name for row, name, _ in weight_rows(arch) if not row.copy_of_another]


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face model, in table order."""
    return {
        tensor.name.format(layer=layer): _hf_shape(arch, tensor)
        for row, _, layer in weight_rows(arch)
        if not row.copy_of_another
        for tensor in row.hf
    }


def weight_problems(arch: Architecture, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for every missing, unexpected or wrongly shaped tensor among the `found` names and shapes; [] if none."""
    expected = hf_shapes(arch)
    accepted = dict(expected)
    if arch.tied_embeddings:
        accepted[LM_HEAD.name] = _hf_shape(arch, LM_HEAD)
    ignorable = re.compile("|".join(FAMILIES[arch.family].ignorable))
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, shape in found.items():
        if name in accepted:
            if shape != accepted[name]:
                problems.append(f"{name} has shape {list(shape)}, the configuration asks for {list(accepted[name])}")
        elif ignorable.fullmatch(name) is None:
            problems.append(f"{name} {list(shape)} has no place in a {arch.family} model")
    return problems


def fill_shard(plan: ShardPlan, read: Callable[[str, tuple[slice, ...]], torch.Tensor], shard: torch.Tensor) -> None:
    """Overwrites `shard` with the plan's pieces, cast to its dtype, and zeros in the vocabulary's padding rows.

    `read(hf_name, slices)` is called for one piece after another, so no more than a piece is held beside the shard.
    """
    if tuple(shard.shape) != plan.shape:
        raise ConversionError(
            f"{plan.megatron_name} has shape {list(shard.shape)} in the model, the conversion makes "
            f"{list(plan.shape)}; build the model from the same architecture and tensor-parallel size"
        )
    filled = 0
    for piece in plan.pieces:
        length = piece.stop - piece.start
        shard.narrow(plan.axis, filled, length).copy_(read(piece.hf_name, plan.slices(piece)))
        filled += length
    shard.narrow(plan.axis, filled, shard.shape[plan.axis] - filled).zero_()


def cut_rows(plan: ShardPlan, start: int, stop: int) -> ShardPlan:
    """Restricts the plan of a shard whose pieces are rows (`plan.axis` 0) to its rows `start:stop`."""
    pieces: list[Piece] = []
    position = 0
    for piece in plan.pieces:
        # Row `position` of the shard is row `piece.start` of its tensor.
        shift = piece.start - position
        position += piece.stop - piece.start
        first, last = max(start + shift, piece.start), min(stop + shift, piece.stop)
        if first < last:
            pieces.append(Piece(piece.hf_name, first, last))
    return replace(plan, shape=(stop - start, *plan.shape[1:]), pieces=tuple(pieces))


def merge_shards(plans: Sequence[ShardPlan], shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merges one parameter's shards of all tensor-parallel ranks, in rank order, to whole Hugging Face tensors.

    A replicated parameter is taken from the first rank. Padding rows of the vocabulary are left out.
    """
    if plans[0].replicated:
        plans, shards = plans[:1], shards[:1]
    merged = {
        name: torch.empty(shape, dtype=shards[0].dtype, device=shards[0].device)
        for name, shape in plans[0].hf_shapes.items()
    }
    for plan, shard in zip(plans, shards, strict=True):
        taken = 0
        for piece in plan.pieces:
            length = piece.stop - piece.start
            target = merged[piece.hf_name].narrow(plan.axis, piece.start, length)
            target.copy_(shard.narrow(plan.axis, taken, length))
            taken += length
    return merged


def _check_divisible(arch: Architecture, tp_size: int) -> None:
    groups = arch.num_query_groups
    problems = [
        f"{what} ({size}) is not a multiple of the tensor-parallel size {tp_size}"
        for what, size in (("num_attention_heads", arch.num_attention_heads), ("ffn_hidden_size", arch.ffn_hidden_size))
        if size % tp_size
    ]
    if groups % tp_size and tp_size % groups:
        problems.append(
            f"num_query_groups ({groups}) neither divides the tensor-parallel size {tp_size} nor vice versa"
        )
    if problems:
        raise ConversionError("; ".join(problems) + "; choose another parallel.tensor")


def _shard_plan(arch: Architecture, row: WeightRow, name: str, layer: int, *, tp_rank: int, tp_size: int) -> ShardPlan:
    shapes = {tensor.name.format(layer=layer): _hf_shape(arch, tensor) for tensor in row.hf}
    names = list(shapes)
    whole = next(iter(shapes.values()))
    # With one rank, all columns are also all rows, and `cut_rows` takes rows.
    by_column = row.split is Split.COLUMNS and tp_size > 1
    axis = 1 if by_column else 0
    if row.split is Split.REPLICATED or (row.split is Split.COLUMNS and not by_column):
        size = whole[0]
        pieces = [Piece(names[0], 0, size)]
    elif row.split is Split.VOCAB_ROWS:
        size = arch.padded_vocab_size(tp_size) // tp_size
        pieces = [Piece(names[0], size * tp_rank, min(size * (tp_rank + 1), arch.vocab_size))]
    elif by_column:
        size = whole[1] // tp_size
        pieces = [Piece(names[0], size * tp_rank, size * (tp_rank + 1))]
    elif row.split is Split.GATE_UP_ROWS:
        part = whole[0] // tp_size
        size = 2 * part
        pieces = [Piece(hf_name, part * tp_rank, part * (tp_rank + 1)) for hf_name in names]
    else:
        size = sum(shape[0] for shape in shapes.values()) // tp_size
        pieces = _qkv_pieces(arch, names, start=size * tp_rank, stop=size * (tp_rank + 1))
    return ShardPlan(
        megatron_name=name,
        shape=(*whole[:axis], size, *whole[axis + 1 :]),
        axis=axis,
        pieces=tuple(piece for piece in pieces if piece.start < piece.stop),
        hf_shapes=shapes,
        replicated=row.split is Split.REPLICATED,
    )


def _qkv_pieces(arch: Architecture, names: Sequence[str], *, start: int, stop: int) -> list[Piece]:
    """Pieces of rows `start:stop` of the grouped order; with more ranks than groups they may begin inside a group."""
    query_rows = arch.num_attention_heads // arch.num_query_groups * arch.head_dim
    pieces: list[Piece] = []
    position = 0
    for group in range(arch.num_query_groups):
        for hf_name, rows in zip(names, (query_rows, arch.head_dim, arch.head_dim), strict=True):
            first, last = max(start, position), min(stop, position + rows)
            # Row `position` of the grouped order is row `group * rows` of this tensor.
            shift = group * rows - position
            pieces.append(Piece(hf_name, first + shift, last + shift))
            position += rows
    return pieces


def _hf_shape(arch: Architecture, tensor: HFTensor) -> tuple[int, ...]:
    sizes = {
        Axis.VOCAB: arch.vocab_size,
        Axis.HIDDEN: arch.hidden_size,
        Axis.FFN: arch.ffn_hidden_size,
        Axis.QUERY: arch.num_attention_heads * arch.head_dim,
        Axis.KEY_VALUE: arch.num_query_groups * arch.head_dim,
        Axis.HEAD: arch.head_dim,
    }
    return tuple(sizes[axis] for axis in tensor.axes)
