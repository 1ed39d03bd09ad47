"""Slices of flattened arrays as boxes: what data-parallel ranks write of an optimizer's state."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing import ShardedTensor

from megadpo.optimizer.sliced_state import _boxes, boxes_of_slice

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(SHAPES, st.data())
def test_boxes_hold_the_slice_in_its_order(shape: list[int], data: st.DataObject) -> None:
    elements = torch.arange(math.prod(shape)).view(shape)
    end = data.draw(st.integers(0, elements.numel()))
    start = data.draw(st.integers(0, end))
    boxes = list(boxes_of_slice(shape, start, end))
    held = [elements[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in boxes]
    assert torch.cat([*held, torch.empty(0)]).tolist() == list(range(start, end))
    assert len(boxes) <= 2 * len(shape) - 1


def test_the_whole_is_one_box() -> None:
    assert list(boxes_of_slice((4, 3, 2), 0, 24)) == [((0, 0, 0), (4, 3, 2))]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 24), min_size=2, max_size=4), st.booleans())
def test_ranks_write_every_element_of_a_split_parameter_once(cuts: list[int], layered: bool) -> None:
    """A feed-forward matrix whose two halves have places of their own, of tensor rank 1 of 2, layer 1 of 3."""
    parameter = torch.arange(24.0).view(4, 6)
    bounds = sorted({0, *cuts, 24})
    prepended, layer, offset = (1, (1,), (3,)) if layered else (0, (), ())
    whole = torch.full((*offset, 8, 6), -1.0)
    for half, view in enumerate(parameter.chunk(2)):
        shard = ShardedTensor(
            key="decoder.mlp",
            data=view,
            dtype=view.dtype,
            local_shape=(2, 6),
            global_shape=(*offset, 8, 6),
            global_offset=(*layer, 4 * half + 2, 0),
            axis_fragmentations=None,
            replica_id=(0, 0, 3),
            prepend_axis_num=prepended,
        )
        for start, end in itertools.pairwise(bounds):
            own = parameter.view(-1)[start:end]
            for box in _boxes(shard, 12 * half, "exp_avg", own, start):
                place = tuple(slice(o, o + s) for o, s in zip(box.global_offset, box.local_shape, strict=True))
                assert (whole[place] == -1.0).all(), "written twice"
                whole[place] = box.data
                assert (box.key, box.replica_id) == ("optimizer.state.exp_avg.decoder.mlp", (0, 0, 0))
    rows = whole[1] if layered else whole
    assert torch.equal(rows[2:4], parameter[:2])
    assert torch.equal(rows[6:8], parameter[2:])
    assert (rows[[0, 1, 4, 5]] == -1.0).all()
