"""Megatron's distributed optimizer, with states that go into checkpoints and come back slice by slice.

Each data-parallel rank holds a slice of every flattened parameter's states. Megatron's `fully_reshardable` format asks
for states in their parameter's shape; Megatron makes them by gathering all slices on every rank, which costs each 12
bytes of host memory for every parameter of its model-parallel shard, and most of a save's time. But a slice of a
flattened array is a few boxes of the array, and boxes are all that the distributed format knows: every rank writes and
reads its own. The format on disk is the same; which layout wrote it, and whether slices were gathered, can't be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# Offsets and sizes by dimension.
Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]

_STATES = ("param", "exp_avg", "exp_avg_sq")


def boxes_of_slice(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """The boxes of an array of `shape` that elements [start, end) of it make up when it is flattened, in their order.

    At most one whole box and, for each dimension but the last, two partial ones around it.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    inner = tuple(shape[1:])
    row = math.prod(inner)
    first, last = start // row, end // row
    if start % row:
        for offset, size in boxes_of_slice(inner, start % row, min(row, end - first * row)):
            yield (first, *offset), (1, *size)
        first += 1
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    if first <= last:
        for offset, size in boxes_of_slice(inner, 0, end % row):
            yield (last, *offset), (1, *size)


class SlicedOptimizer(DistributedOptimizer):
    """DistributedOptimizer (megatron-core 0.16) whose `fully_reshardable` state is made of this rank's slices."""

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[int, dict[str, list[ShardedTensor]]]:
        """Main weights and moments by parameter and name, each as boxes of the parameter; no communication.

        To be saved they are this rank's own, not copies, wherever they are kept in fp32; to be loaded, new tensors.
        """
        described, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        by_parameter = {sharded.data: sharded for sharded in nested_values(described)}
        state = {}
        for index, (parameter, start, end) in enumerate(self._slices()):
            shards = list(_contiguous_shards(by_parameter[parameter]))
            values = (
                {name: torch.empty(end - start, dtype=torch.float32, device="cpu") for name in _STATES}
                if is_loading
                else {name: value.float() for name, value in self._states(parameter).items()}
            )
            state[index] = {
                name: [box for at, shard in shards for box in _boxes(shard, at, name, value.view(-1), start)]
                for name, value in values.items()
            }
        return state

    @torch.no_grad()
    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[int, dict[str, list[torch.Tensor]]]) -> None:
        """Takes over loaded main weights and moments, shaped as `sharded_param_state_fully_reshardable` asked."""
        for index, (parameter, _, _) in enumerate(self._slices()):
            flat = {name: torch.cat([box.view(-1) for box in boxes]) for name, boxes in state_dict[index].items()}
            self._set_main_param_and_optimizer_states(parameter, flat)
        if isinstance(self.optimizer, HybridDeviceOptimizer):
            self.optimizer._sync_hdo_state_to_sub_optimizers()

    def _slices(self) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        """The parameters of which this rank has a part, with its bounds in the flattened parameter."""
        for buckets_by_dtype in self.gbuf_ranges:
            for buckets in buckets_by_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield parameter, ranges["param"].start, ranges["param"].end

    def _states(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        held = self._get_main_param_and_optimizer_states(parameter)
        # Plain tensors, whatever kind of its own an optimizer keeps: no other may be read again.
        return {name: held[name].detach().as_subclass(torch.Tensor) for name in _STATES}


def _contiguous_shards(sharded: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[int, ShardedTensor]]:
    """What a parameter is in the checkpoint: shards, each with the place where it begins in the flattened parameter."""
    shards = nested_values(sharded.build()) if isinstance(sharded, ShardedTensorFactory) else [sharded]
    for shard in shards:
        assert shard.data.is_contiguous(), f"{shard.key} is not contiguous in its parameter"
        yield (shard.data.data_ptr() - sharded.data.data_ptr()) // shard.data.element_size(), shard


def _boxes(shard: ShardedTensor, at: int, name: str, values: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """The boxes of `shard` that hold a state's `values`, which begin at `start` in the flattened parameter.

    `shard` begins at `at`.
    """
    begin, end = max(start, at), min(start + values.numel(), at + shard.data.numel())
    for offset, size in boxes_of_slice(shard.local_shape, begin - at, end - at):
        length = math.prod(size)
        full_offset = [0] * shard.prepend_axis_num + list(offset)
        full_size = (1,) * shard.prepend_axis_num + size
        yield ShardedTensor(
            key=f"optimizer.state.{name}.{shard.key}",
            data=values[begin - start : begin - start + length].view(full_size),
            dtype=values.dtype,
            local_shape=full_size,
            global_shape=shard.global_shape,
            global_offset=tuple(map(sum, zip(shard.global_offset, full_offset, strict=True))),
            axis_fragmentations=None,  # boxes of many sizes
            replica_id=(*shard.replica_id[:-1], 0),  # the last one counts data-parallel ranks: no other has this slice
            allow_shape_mismatch=shard.allow_shape_mismatch,
        )
        begin += length
