"""What ranks do in the tests of the reference's modes; module-level functions that `launch` can send."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core import dist_checkpointing

import megadpo.commands.train
import megadpo.setup.reference_cache
from megadpo.forward_step import score_batch
from megadpo.models.policy import PolicyModel
from megadpo.reference.key import CacheKey
from megadpo.reference.store import LogProbs, LogProbStore, open_store
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from megadpo.setup.models import build_policy, load_reference_model
from tests.helpers.jobs.fault import captured_log
from tests.helpers.jobs.training import train


@dataclass
class Watched:
    """What was done for the reference: rows scored, models loaded, models alive when the policy is built; the log.

    `asked` are the rows that the policy scored before training.
    """

    asked: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    loaded: int = 0
    alive: int = 0
    log: list[str] = field(default_factory=list)


def train_and_watch(overrides: list[str]) -> Watched:
    """`train`, watched."""
    seen = Watched()
    built = False

    def score(chunks: Any, batch: Any, *rest: Any) -> Any:
        (seen.asked if built else seen.scored).extend(batch.pair_indices)
        return score_batch(chunks, batch, *rest)

    def load(*args: Any) -> Any:
        seen.loaded += 1
        return load_reference_model(*args)

    def build(*args: Any, **options: Any) -> Any:
        nonlocal built
        built = True
        seen.alive = sum(isinstance(thing, PolicyModel) for thing in gc.get_objects())
        return build_policy(*args, **options)

    with (
        mock.patch.object(megadpo.setup.reference_cache, "score_batch", score),
        mock.patch.object(megadpo.setup.reference_cache, "load_reference_model", load),
        mock.patch.object(megadpo.commands.train, "build_policy", build),
        captured_log() as seen.log,
    ):
        train(overrides)
    return seen


def die_while_filling(overrides: list[str], groups: int) -> None:
    """`train`, killed when so many groups have been kept and the next one's records are written in part."""
    append, kept = LogProbStore.append, []

    def killed(self: LogProbStore, digests: Sequence[bytes], logps_n4: LogProbs) -> None:
        append(self, digests, logps_n4)
        kept.append(len(digests))
        if len(kept) == groups:
            (segment,) = self.segments()
            with segment.open("ab") as file:
                file.write(b"the beginning of a record")
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(LogProbStore, "append", killed):
        train(overrides)


def read_checkpoint(directory: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint but for the optimizer's, by name."""
    device = select_device("cpu")
    with megatron_device(device), distributed(device, timeout_s=60):
        build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        tensors = dist_checkpointing.load_plain_tensors(directory)
        return {
            name: tensor.float().numpy()
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor) and not name.startswith("optimizer.")
        }


def append_slowly(cache_dir: Path, key: CacheKey, digests: list[bytes], values: LogProbs) -> None:
    """Keeps records one by one."""
    with open_store(cache_dir, key) as store:
        for digest, value in zip(digests, values, strict=True):
            store.append([digest], value[None])
