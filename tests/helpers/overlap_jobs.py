"""A run whose gradient reduction overlaps the backward and whose parameter gathering overlaps the next forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule

import megadpo.assembly
import megadpo.optimizer
import megadpo.run
from megadpo.optimizer import wrap_data_parallel
from megadpo.train_step import StepResult, train_step
from tests.helpers.jobs import train

# Elements: the head of a tiny model has a bucket of its own.
_BUCKET = 10_000


def overlapped(modules: Sequence[MegatronModule]) -> list[DistributedDataParallel]:
    """`wrap_data_parallel` with both overlaps, over many buckets."""

    def config(**options: Any) -> DistributedDataParallelConfig:
        overlaps = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": _BUCKET}
        return DistributedDataParallelConfig(**(options | overlaps))

    with mock.patch.object(megadpo.optimizer, "DistributedDataParallelConfig", config):
        (chunk,) = wrap_data_parallel(modules)
    assert len(chunk.bucket_groups) > 3
    chunk.config.no_sync_func = chunk.no_sync  # only the last microbatch's gradients are sent
    return [chunk]


def train_overlapped(overrides: list[str], steps: int) -> str:
    """`train`; the parameters of the last of the `steps` are gathered before they are saved."""
    done = 0

    def update(chunks: Sequence[DistributedDataParallel], *args: Any, **options: Any) -> StepResult:
        nonlocal done
        result = train_step(chunks, *args, **options)
        done += 1
        if done == steps:
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
        return result

    with (
        mock.patch.object(megadpo.assembly, "wrap_data_parallel", overlapped),
        mock.patch.object(megadpo.run, "train_step", update),
    ):
        return train(overrides)
