"""Names, shapes and boxes of a checkpoint's tensors, mapped to Hugging Face tensors: pure arithmetic.

Megatron stores a parameter of all layers as one tensor with the layer as its first axis, cut into boxes, which depend
on the writer (this program's import, or a training at any layout).
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

# Number of values that are processed at a time: a thread holds a few times as many, for tensors of any size.
_BLOCK_VALUES = 2**24
_LAYER = "{layer}."


class Box(NamedTuple):
    """A part of a stored tensor: its offsets and its sizes along all axes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def values(self) -> int:
        """Number of values in the box."""
        return math.prod(self.sizes)


class HFBlock(NamedTuple):
    """A block of values of the Hugging Face tensor `name` that starts at `row` and `column`; vectors only have rows."""

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
    """One Megatron parameter in a checkpoint: it is in the tensor `key`, at index `layer` of that tensor's first axis.

    `layer` is None for parameters outside the layers, which have a tensor of their own. `plan` is that of the whole
    parameter. A `padded` one may have any number of zero rows at its end.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    plan: ShardPlan
    padded: bool

    def boxes(self) -> Iterator[Box]:
        """Cuts the parameter into boxes of whole rows, each of about one block."""
        for start, stop in _row_ranges(self.plan.shape):
            inner = self.plan.shape[1:]
            leading = () if self.layer is None else (self.layer,)
            yield Box((*leading, start, *(0 for _ in inner)), (*(1 for _ in leading), stop - start, *inner))

    def owns(self, box: Box) -> bool:
        """True if a box of the tensor holds values of this parameter and of no other."""
        return self.layer is None or (box.offsets[0], box.sizes[0]) == (self.layer, 1)

    def within(self, box: Box) -> Box:
        """Returns a box of this parameter without the axis of layers."""
        return box if self.layer is None else Box(box.offsets[1:], box.sizes[1:])

    def fits(self, shape: Sequence[int]) -> bool:
        """True if a tensor of this shape can hold the parameter."""
        if not self.padded:
            return tuple(shape) == self.shape
        needed = sum(piece.stop - piece.start for piece in self.plan.pieces)
        return tuple(shape[1:]) == self.shape[1:] and shape[0] >= needed

    def plan_of(self, box: Box) -> ShardPlan:
        """The plan of the rows of a box of this parameter, in their whole width."""
        (start, *_), (rows, *_) = self.within(box)
        return cut_rows(self.plan, start, start + rows)

    def hf_blocks(self, box: Box, values: torch.Tensor) -> Iterator[HFBlock]:
        """Yields the values of a box of this parameter as blocks of Hugging Face tensors, without padding rows."""
        (first, *columns), sizes = self.within(box)
        matrix = values.view(sizes)
        for start, stop in _row_ranges(sizes):
            position = start
            for piece in cut_rows(self.plan, first + start, first + stop).pieces:
                rows = piece.stop - piece.start
                yield HFBlock(piece.hf_name, piece.start, sum(columns), matrix[position : position + rows])
                position += rows


def stored_parameters(arch: Architecture) -> list[StoredParameter]:
    """All parameters of the model that a checkpoint holds, without repetition, in table order."""
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
    """Reasons why tensors, given as their shapes and boxes, can't be the weights of the model; [] if they can."""
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
    """Name of the tensor that holds a parameter: the name in its table row without the layer."""
    before, layer, name = megatron.partition(_LAYER)
    for native, stored in CHECKPOINT_NAMES.items() if layer else ():
        if name.startswith(native):
            name = stored + name.removeprefix(native)
    return before + name


def _row_ranges(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the row ranges [start, stop) of the blocks of a matrix or vector."""
    rows, *inner = sizes
    step = max(1, _BLOCK_VALUES // math.prod(inner))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
