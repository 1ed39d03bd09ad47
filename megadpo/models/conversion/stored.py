"""Pure arithmetic of a checkpoint's tensors: their names and shapes, and where their boxes lie in Hugging Face tensors.

Megatron stores a parameter of all layers as one tensor with the layer as its first axis, cut into boxes; which boxes is
up to who writes it (this program's import, or a training at any layout).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from megadpo.models.conversion.families import CHECKPOINT_NAMES, Split
from megadpo.models.conversion.mapping import ShardPlan, cut_rows, shard_plans, weight_rows

if TYPE_CHECKING:
    from megadpo.models.hf_config import Architecture

# Values that are worked on at a time: a thread holds a few times this, whatever the size of the tensor.
_BLOCK_VALUES = 2**24
_LAYER = "{layer}."


class Box(NamedTuple):
    """A part of a stored tensor: its first index and its extent along each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def values(self) -> int:
        """Number of values in it."""
        return math.prod(self.sizes)


class HFBlock(NamedTuple):
    """Values that lie from `row` and `column` on in the Hugging Face tensor `name`; a vector has rows only."""

    name: str
    row: int
    column: int
    values: torch.Tensor

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the block within its tensor."""
        firsts = (self.row, self.column)
        return tuple(slice(first, first + size) for first, size in zip(firsts, self.values.shape, strict=False))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredParameter:
    """One Megatron parameter as a checkpoint holds it: in the tensor `key`, at `layer` of that tensor's first axis.

    `layer` is None for parameters outside the layers, which have a tensor to themselves. `plan` is the whole
    parameter's. A `padded` one may have any number of zero rows at its end.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    plan: ShardPlan
    padded: bool

    def boxes(self) -> Iterator[Box]:
        """The parameter in boxes of whole rows that make up a block."""
        for start, stop in _row_ranges(self.plan.shape):
            inner = self.plan.shape[1:]
            leading = () if self.layer is None else (self.layer,)
            yield Box((*leading, start, *(0 for _ in inner)), (*(1 for _ in leading), stop - start, *inner))

    def owns(self, box: Box) -> bool:
        """Whether a box of the tensor holds values of this parameter, and no other's."""
        return self.layer is None or (box.offsets[0], box.sizes[0]) == (self.layer, 1)

    def within(self, box: Box) -> Box:
        """A box that it owns, without the axis of layers."""
        return box if self.layer is None else Box(box.offsets[1:], box.sizes[1:])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can hold it."""
        if not self.padded:
            return tuple(shape) == self.shape
        needed = sum(piece.stop - piece.start for piece in self.plan.pieces)
        return tuple(shape[1:]) == self.shape[1:] and shape[0] >= needed

    def plan_of(self, box: Box) -> ShardPlan:
        """The plan of the rows that a box which it owns takes up, in their whole width."""
        (start, *_), (rows, *_) = self.within(box)
        return cut_rows(self.plan, start, start + rows)

    def hf_blocks(self, box: Box, values: torch.Tensor) -> Iterator[HFBlock]:
        """Where the values of a box that it owns belong, block by block, without those of padding rows."""
        (first, *columns), sizes = self.within(box)
        matrix = values.view(sizes)
        for start, stop in _row_ranges(sizes):
            position = start
            for piece in cut_rows(self.plan, first + start, first + stop).pieces:
                rows = piece.stop - piece.start
                yield HFBlock(piece.hf_name, piece.start, sum(columns), matrix[position : position + rows])
                position += rows


def stored_parameters(arch: Architecture) -> list[StoredParameter]:
    """Every parameter of the model that a checkpoint holds, each once, in table order."""
    plans = shard_plans(arch, tp_rank=0, tp_size=1)
    parameters = []
    for row, name, layer in weight_rows(arch):
        if not row.copy_of_another:
            layered = _LAYER in row.megatron
            plan = plans[name]
            parameters.append(
                StoredParameter(
                    key=_key(row.megatron),
                    layer=layer if layered else None,
                    shape=(arch.num_layers, *plan.shape) if layered else plan.shape,
                    plan=plan,
                    padded=row.split is Split.VOCAB_ROWS,
                )
            )
    return parameters


def stored_problems(arch: Architecture, found: Mapping[str, tuple[Sequence[int], Sequence[Box]]]) -> list[str]:
    """What keeps tensors, given as their shapes and boxes, from being the weights of the model; empty if nothing."""
    parameters = stored_parameters(arch)
    expected = {parameter.key: parameter for parameter in parameters}
    problems = [f"{key} is missing" for key in sorted(expected.keys() - found.keys())]
    problems += [f"{key} has no place in the model" for key in sorted(found.keys() - expected.keys())]
    for key in sorted(expected.keys() & found.keys()):
        shape, boxes = list(found[key][0]), found[key][1]
        if not expected[key].fits(shape):
            problems.append(f"{key} has shape {shape}, the configuration asks for {list(expected[key].shape)}")
            continue
        owners = [parameter for parameter in parameters if parameter.key == key]
        held = sum(box.values for parameter in owners for box in boxes if parameter.owns(box))
        if held != math.prod(shape):
            problems.append(f"{key} has {held} of its {math.prod(shape)} values")
    return problems


def _key(megatron: str) -> str:
    """Name of the tensor that holds a parameter, from the name in its row: without the layer."""
    before, layer, name = megatron.partition(_LAYER)
    for native, stored in CHECKPOINT_NAMES.items() if layer else ():
        if name.startswith(native):
            name = stored + name.removeprefix(native)
    return before + name


def _row_ranges(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, one past the last) row of each block of a matrix or vector."""
    rows, *inner = sizes
    step = max(1, _BLOCK_VALUES // math.prod(inner))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
