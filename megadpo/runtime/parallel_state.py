"""Builds the process groups of a parallel layout, and this rank's position in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megadpo.runtime.device import Device


@dataclass(frozen=True, slots=True)
class ParallelState:
    """This rank's position in the tensor × pipeline × data grid, and its process groups.

    `virtual_pipeline_size` is the number of model chunks on each pipeline stage (1 without interleaving).
    """

    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        """True where this rank holds the last layers and the head, and so computes the log-probs and the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """True on global rank 0, which writes files and logs."""
        return self.tensor_rank == self.pipeline_rank == self.data_rank == 0


@contextmanager
def distributed(device: Device, *, timeout_s: float) -> Iterator[None]:
    """Opens the default process group for the duration of the context (a world of one if there is no launcher).

    Does not destroy the group when the body raises: destroying it would wait for peers that may never come.
    """
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(device.backend, timeout=timeout)
    else:
        # A store in memory needs no port, which could collide with another run on this machine.
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    yield
    dist.destroy_process_group()


def build_parallel_state(
    *, tensor: int, pipeline: int, virtual_pipeline: int | None, seed: int, timeout_s: float
) -> ParallelState:
    """Initialises Megatron's model-parallel groups over the default group and returns this rank's position in them.

    The world must be a multiple of tensor × pipeline; the quotient is the data-parallel size.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    # Megatron forks its random state around sequence-parallel regions, even where nothing random happens.
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelState(
        tensor_rank=mpu.get_tensor_model_parallel_rank(),
        tensor_size=tensor,
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline,
        virtual_pipeline_size=virtual_pipeline or 1,
        data_rank=mpu.get_data_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
        tensor_group=mpu.get_tensor_model_parallel_group(),
        pipeline_group=mpu.get_pipeline_model_parallel_group(),
    )


@contextmanager
def simulated_parallel_state(
    *, tensor: int, pipeline: int, virtual_pipeline: int | None, data: int, stage: int
) -> Iterator[ParallelState]:
    """Yields the state of a pipeline stage's first rank in a world that does not exist; collectives return at once.

    For building models on the meta device. No process group may exist; Megatron's groups of an earlier one are
    destroyed.
    """
    from megatron.core import parallel_state as mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    mpu.destroy_model_parallel()
    ranks_of_a_stage = tensor * data
    excepthook = sys.excepthook  # every group that is opened puts its rank before tracebacks, for good
    dist.init_process_group(
        "fake", store=FakeStore(), rank=stage * ranks_of_a_stage, world_size=pipeline * ranks_of_a_stage
    )
    try:
        yield build_parallel_state(
            tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual_pipeline, seed=0, timeout_s=60.0
        )
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = excepthook
