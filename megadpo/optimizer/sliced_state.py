"""Megatron's distributed optimizer, with states that are saved and loaded slice by slice.

Each data-parallel rank holds a slice of every flattened parameter's states. Megatron's `fully_reshardable` format needs
states in their parameter's shape, for which Megatron gathers all slices on every rank; that costs each rank 12 bytes of
host memory per parameter of its model-parallel shard, and most of a save's time. But a slice of a flattened array
consists of a few boxes of the array, which is what the distributed format stores, so every rank can write and read its
own. The format on disk is the same for every layout, with or without gathering.
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
    """Boxes of an array of `shape` that together are the elements [start, end) of the flattened array, in their order.

    At most one whole box and, for each dimension except the last, two partial ones around it.
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
    """DistributedOptimizer (megatron-core 0.16) whose `fully_reshardable` state consists of this rank's slices."""

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[int, dict[str, list[ShardedTensor]]]:
        """Main weights and moments by parameter and name, each as boxes of the parameter; no communication.

        For saving they are this rank's own tensors, without copying if they are in fp32; for loading, new tensors.
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
        """Takes over loaded main weights and moments, in the shapes of `sharded_param_state_fully_reshardable`."""
        for index, (parameter, _, _) in enumerate(self._slices()):
            flat = {name: torch.cat([box.view(-1) for box in boxes]) for name, boxes in state_dict[index].items()}
            self._set_main_param_and_optimizer_states(parameter, flat)
        if isinstance(self.optimizer, HybridDeviceOptimizer):
            self.optimizer._sync_hdo_state_to_sub_optimizers()

    def _slices(self) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        """Yields the parameters of which this rank has a slice, with its bounds in the flattened parameter."""
        for buckets_by_dtype in self.gbuf_ranges:
            for buckets in buckets_by_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield parameter, ranges["param"].start, ranges["param"].end

    def _states(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        held = self._get_main_param_and_optimizer_states(parameter)
        # Plain tensors, even if the optimizer uses a subclass, since only these can be loaded.
        return {name: held[name].detach().as_subclass(torch.Tensor) for name in _STATES}


def _contiguous_shards(sharded: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[int, ShardedTensor]]:
    """The shards of a parameter in the checkpoint, each with its offset in the flattened parameter."""
    shards = nested_values(sharded.build()) if isinstance(sharded, ShardedTensorFactory) else [sharded]
    for shard in shards:
        assert shard.data.is_contiguous(), f"{shard.key} is not contiguous in its parameter"
        yield (shard.data.data_ptr() - sharded.data.data_ptr()) // shard.data.element_size(), shard


def _boxes(shard: ShardedTensor, at: int, name: str, values: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """The boxes of `shard` that hold a state's `values`, which begin at `start` in the flattened parameter.

    `at` is the offset of `shard`.
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
            replica_id=(
                *shard.replica_id[:-1],
                0,
            ),  # the last one counts data-parallel ranks: no other has this slice
            allow_shape_mismatch=shard.allow_shape_mismatch,
        )
        begin += length
