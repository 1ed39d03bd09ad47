"""Training checkpoints in Megatron's distributed format: written atomically, resharded on load.

A checkpoint directory `step_00000010` holds the weights, the optimizer's state and `training.json`, which says what run
it belongs to. It appears under its name only when it is complete; `latest` names the newest one.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException

from megadpo.errors import CheckpointError
from megadpo.models.conversion.load_save import copy_hf_side_files
from megadpo.rank_logging import get_logger

logger = get_logger(__name__)

_STEP_DIRECTORY = re.compile(r"^step_(\d{8})$")
_DESCRIPTION = "training.json"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint says about its run besides weights: everything else follows from the step.

    `data_digest` is a hash of the retained pairs' token ids; `settings` the configuration as a flat mapping.
    """

    step: int
    num_pairs: int
    data_digest: str
    settings: dict[str, Any]


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives under the run's checkpoint directory."""
    return root / f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _STEP_DIRECTORY.match(p.name) and (p / _DESCRIPTION).is_file())


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: a step directory itself, or the newest of a run or checkpoint directory."""
    if (path / _DESCRIPTION).is_file():
        return path
    for root in (path, path / "checkpoints"):
        found = list_checkpoints(root)
        if found:
            return found[-1]
    raise CheckpointError(f"{path} holds no complete checkpoint (a step_XXXXXXXX directory with {_DESCRIPTION} inside)")


def read_training_state(directory: Path) -> TrainingState:
    """The description that was saved with a checkpoint."""
    try:
        return TrainingState(**json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory / _DESCRIPTION} can't be read: {error}") from error


def _model_state(chunks: Sequence[DistributedDataParallel]) -> dict[str, Any]:
    """Sharded state of this rank's chunks; the tensors carry global names, so the layout is not part of the format."""
    return {f"model{i}": chunk.module.sharded_state_dict(metadata=dict(_METADATA)) for i, chunk in enumerate(chunks)}


def save_checkpoint(
    root: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    state: TrainingState,
    *,
    source: Path,
    dtype: torch.dtype,
    keep_last: int,
) -> Path:
    """Writes the checkpoint of `state.step` and drops all but the `keep_last` newest; its directory.

    The configuration and tokenizer of the Hugging Face directory `source` are copied inside, as `hf/`, so that the
    checkpoint stands alone. Collective over all ranks. The directory is written under a temporary name and renamed when
    every rank is done; one that is dropped loses its name before its files.
    """
    final = step_directory(root, state.step)
    partial = root / f".{final.name}.partial"
    is_main = dist.get_rank() == 0
    if is_main:
        for leftover in root.glob(".step_*"):  # of saves and removals that were killed
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    model_state = _model_state(chunks)
    content = {**model_state, "optimizer": optimizer.sharded_state_dict(model_state, metadata=dict(_METADATA))}
    # Megatron hands the writers' results over through a queue of a spawned manager process, which re-imports the main
    # module (12 s a save). Nothing is asynchronous here: a queue in this process does.
    with mock.patch.object(filesystem_async, "_get_write_results_queue", queue.Queue):
        dist_checkpointing.save(content, str(partial), content_metadata=dict(_METADATA))
    dist.barrier()
    if is_main:
        copy_hf_side_files(source, partial / "hf", dtype=dtype)
        write_durably(partial / _DESCRIPTION, json.dumps(asdict(state), indent=1))
        if final.exists():
            _remove(final)
        partial.rename(final)
        write_durably(root / "latest", final.name + "\n")
        for old in list_checkpoints(root)[:-keep_last]:
            _remove(old)
    dist.barrier()
    return final


def write_durably(path: Path, text: str) -> None:
    """Replaces a text file by rename, on disk before it has its name: a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _remove(checkpoint: Path) -> None:
    """Takes the checkpoint's name away, then its files: killed in between, it is not taken for a complete one."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.removed")))


def load_checkpoint(directory: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fills weights, main weights and moments from a checkpoint of any layout. Collective over all ranks."""
    inner = _distributed_optimizers(optimizer)
    _allocate_moments(inner)
    model_state = _model_state(chunks)
    content = {
        **model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=dict(_METADATA)),
    }
    try:
        loaded = dist_checkpointing.load(content, str(directory), strict="raise_all")
    except (CheckpointException, CheckpointingException, OSError, KeyError, ValueError) as error:
        # Neither Megatron's errors nor torch's (a BaseException with every rank's traceback) say what to do.
        causes = [str(cause) for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        reason = "; ".join(dict.fromkeys(causes)) or error
        raise CheckpointError(
            f"checkpoint {directory} can't be loaded: {reason}. It is damaged, or of a model of another shape; name "
            "another one with train.resume=DIR"
        ) from error
    for index, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[f"model{index}"])
    states = [loaded["optimizer"]] if len(inner) == 1 else list(loaded["optimizer"].values())
    for member, member_state in zip(inner, states, strict=True):
        _load_optimizer(member, member_state)


def _load_optimizer(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Fills one distributed optimizer from its loaded state.

    Two things go wrong when Megatron does this by itself with torch's AdamW: it looks for a step counter among the
    loaded tensors, where there is none, and it gives one counter to all parameters, which then counts N a step.
    """
    parameter_state = state.pop("param_state")
    optimizer.load_state_dict(state)
    per_parameter = optimizer.optimizer.state.values()
    counters = [values.pop("step", None) for values in per_parameter]
    optimizer.load_parameter_state_from_fully_reshardable(parameter_state)
    for values, counter in zip(per_parameter, counters, strict=True):
        if counter is not None:
            values["step"] = counter.clone()


def _distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers inside Megatron's wrapper."""
    members = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return list(members)


def _allocate_moments(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Gives every parameter zero moments and a step counter: Megatron can't describe a fresh torch AdamW."""
    for optimizer in optimizers:
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
        if isinstance(optimizer.optimizer, torch.optim.AdamW):
            for group in optimizer.optimizer.param_groups:
                group.setdefault("step", 0)
                for parameter in group["params"]:
                    optimizer.optimizer.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32))
