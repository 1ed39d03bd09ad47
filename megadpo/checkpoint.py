"""Checkpoints in Megatron's distributed format: written atomically, resharded on load.

A run's `step_00000010` holds the weights, the optimizer's state and `training.json`, which says what run it belongs to;
an imported checkpoint holds weights and `imported.json`. A directory appears under its name only when it is complete;
`latest` names the newest one of a run.
"""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megadpo.checkpoint_files import (
    HF_DIRECTORY,
    IMPORTED,
    LATEST,
    TRAINED,
    ImportedModel,
    TrainingState,
    list_checkpoints,
    step_directory,
    stored_vocab_size,
)
from megadpo.errors import CheckpointError, MegaDPOError, listing
from megadpo.files import write_durably, writing
from megadpo.host_optimizer import HostOptimizer
from megadpo.models.conversion.side_files import SideFiles, write_side_files
from megadpo.optimizer import distributed_optimizers, gather_weights
from megadpo.parallel.collectives import on_main
from megadpo.rank_logging import get_logger, global_rank

logger = get_logger(__name__)

_RESTORE = "which is not the file that they were saved with: bring that one back, or name another checkpoint"
WEIGHTS_FROM = "model.checkpoint=DIR (--checkpoint DIR)"
# What Transformer Engine's modules keep besides their parameters ends in this.
_EXTRA_STATE = "_extra_state"
# What a checkpoint holds besides the weights of its model.
_REFERENCE = "reference."
NOT_WEIGHTS = ("optimizer.", _REFERENCE)
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _model_state(modules: Sequence[MegatronModule]) -> dict[str, Any]:
    """Sharded state of this rank's chunks; the tensors carry global names, so the layout is not part of the format.

    Transformer Engine's modules have a state besides their weights, which is empty but for FP8's delayed scaling: it is
    left out where it is empty, so that native layers read the same checkpoint.
    """
    state = {}
    for index, module in enumerate(modules):
        chunk = module.sharded_state_dict(metadata=dict(_METADATA))
        if not _has_amax_history(module):
            chunk = {name: value for name, value in chunk.items() if not name.endswith(_EXTRA_STATE)}
        state[f"model{index}"] = chunk
    return state


def _reference_state(modules: Sequence[MegatronModule]) -> dict[str, Any]:
    """Sharded state of a reference's chunks, under names of its own; {} without any."""
    state = {f"reference_{name}": chunk for name, chunk in _model_state(modules).items()}
    add_prefix_for_sharding(state, _REFERENCE)
    return state


def _has_amax_history(module: MegatronModule) -> bool:
    return bool(module.config.fp8) and module.config.fp8_recipe == "delayed"


def _fill(modules: Sequence[MegatronModule], loaded: dict[str, Any]) -> None:
    """Copies a loaded `_model_state` into the modules."""
    for index, module in enumerate(modules):
        missing, unexpected = module.load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected and all(name.endswith(_EXTRA_STATE) for name in missing)


def save_checkpoint(
    root: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    state: TrainingState,
    *,
    side_files: SideFiles,
    dtype: torch.dtype,
    keep_last: int,
    reference: Sequence[MegatronModule] = (),
) -> Path:
    """Writes the checkpoint of `state.step` and drops all but the `keep_last` newest; its directory.

    `reference` are the chunks of one that changes, which a run can't have from anywhere else when it goes on.
    The configuration and tokenizer go inside as `hf/`, so that the checkpoint stands alone. Collective over all ranks.
    The directory is written under a temporary name and renamed when every rank is done; one that is dropped loses its
    name before its files.
    """
    final = step_directory(root, state.step)
    partial = root / f".{final.name}.partial"
    on_main(lambda: _remove_leftovers(root))
    gather_weights(chunks)
    _renew_main_weights(distributed_optimizers(optimizer))
    model_state = _model_state([chunk.module for chunk in chunks])
    content = {
        **model_state,
        **_reference_state(reference),
        "optimizer": optimizer.sharded_state_dict(model_state, metadata=dict(_METADATA)),
    }
    _write_content(partial, content)

    def finish() -> None:
        write_side_files(side_files, partial / HF_DIRECTORY, dtype=dtype)
        write_durably(partial / TRAINED, json.dumps(asdict(state), indent=1))
        with writing(final, CheckpointError):
            if final.exists():
                _remove(final)
            partial.rename(final)
        write_durably(root / LATEST, final.name + "\n")
        for old in list_checkpoints(root)[:-keep_last]:
            _remove(old)

    on_main(finish)
    return final


def save_imported(
    directory: Path,
    write: Callable[[Path], None],
    description: ImportedModel,
    *,
    side_files: SideFiles,
    dtype: torch.dtype,
) -> None:
    """Makes a checkpoint that stands alone of the distributed files that `write(DIRECTORY)` writes, and the side files.

    Collective over all ranks. `directory` must not exist, or be empty; it appears when every rank is done. Where it
    can't be made, nothing is left.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    on_main(lambda: shutil.rmtree(partial, ignore_errors=True))  # of an import that was killed

    def finish() -> None:
        write_side_files(side_files, partial / HF_DIRECTORY, dtype=dtype)
        write_durably(partial / IMPORTED, json.dumps(asdict(description), indent=1))
        with writing(directory, CheckpointError):
            partial.rename(directory)

    try:
        _write_content(partial, {}, _FilesOf(write))
        on_main(finish)
    except MegaDPOError:  # on every rank, none of which writes any more
        if global_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


class _FilesOf(SaveShardedStrategy):
    """Has somebody else write the distributed files, instead of Megatron from tensors in memory."""

    def __init__(self, write: Callable[[Path], None]) -> None:
        super().__init__("torch_dist", 1)
        self._write = write

    @property
    def can_handle_sharded_objects(self) -> bool:
        """They are among the files."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        """Writes the files; the state dict is empty."""
        self._write(Path(checkpoint_dir))


def _write_content(directory: Path, content: dict[str, Any], strategy: SaveShardedStrategy | None = None) -> None:
    """Makes `directory` and writes all ranks' sharded state into it; returns on each when every rank is done.

    `strategy` writes it, by default Megatron's own.

    A MegaDPOError on every rank where it can't be written.
    """

    def make() -> None:
        with writing(directory, CheckpointError):
            directory.mkdir(parents=True)

    on_main(make)
    # Megatron hands the writers' results over through a queue of a spawned manager process, which re-imports the main
    # module (12 s a save). Nothing is asynchronous here: a queue in this process does.
    with mock.patch.object(filesystem_async, "_get_write_results_queue", queue.Queue):
        try:
            dist_checkpointing.save(content, str(directory), strategy, content_metadata=dict(_METADATA))
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                if isinstance(cause, MegaDPOError):
                    raise cause from error
            raise CheckpointError(
                f"checkpoint {directory} can't be written: {_causes(error)}: make room, or choose another directory"
            ) from error
    dist.barrier()


def _remove_leftovers(root: Path) -> None:
    """Removes what saves and removals that were killed have left under a run's checkpoint directory."""
    with writing(root, CheckpointError):
        for leftover in root.glob(".step_*"):
            shutil.rmtree(leftover)


def _remove(checkpoint: Path) -> None:
    """Takes the checkpoint's name away, then its files: killed in between, it is not taken for a complete one."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.removed")))


def load_checkpoint(directory: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fills weights, main weights and moments from a checkpoint of any layout. Collective over all ranks."""
    inner = distributed_optimizers(optimizer)
    _allocate_moments(inner)
    model_state = _model_state([chunk.module for chunk in chunks])
    content = {
        **model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=dict(_METADATA)),
    }
    with readable(directory, "train.resume=DIR"):
        loaded, left_over, missing = dist_checkpointing.load(content, str(directory), strict="return_all")
    _check_names(directory, [name for name in left_over if not name.startswith(_REFERENCE)], missing)
    _fill([chunk.module for chunk in chunks], loaded)
    states = [loaded["optimizer"]] if len(inner) == 1 else list(loaded["optimizer"].values())
    for member, member_state in zip(inner, states, strict=True):
        _load_optimizer(member, member_state)


def load_reference(directory: Path, modules: Sequence[MegatronModule]) -> None:
    """Fills a reference's chunks with those that were saved beside a policy. Collective over all ranks."""
    with readable(directory, "train.resume=DIR"):
        loaded, left_over, missing = dist_checkpointing.load(
            _reference_state(modules), str(directory), strict="return_all"
        )
    _check_names(directory, [name for name in left_over if name.startswith(_REFERENCE)], missing)
    _fill(modules, {name.removeprefix("reference_"): chunk for name, chunk in loaded.items()})


def load_weights(directory: Path, modules: Sequence[MegatronModule], *, vocab_size: int) -> None:
    """Overwrites the modules' weights with a checkpoint's, of any layout and cast to theirs; its optimizer is not read.

    Raises CheckpointError, the same on every rank, unless the checkpoint holds the weights of just this model, whose
    vocabulary has `vocab_size` entries without padding. Collective over all ranks.
    """
    on_main(lambda: check_vocabulary(directory, vocab_size))
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.zero_()  # padding that the checkpoint's layout did not have
    with readable(directory, WEIGHTS_FROM):
        loaded, left_over, missing = dist_checkpointing.load(_model_state(modules), str(directory), strict="return_all")
    _check_names(directory, {name for name in left_over if not name.startswith(NOT_WEIGHTS)}, missing)
    _fill(modules, loaded)


def _check_names(directory: Path, left_over: Collection[str], missing: Collection[str]) -> None:
    """Raises CheckpointError where a checkpoint holds more or less than the model; FP8's histories may be either."""
    problems = [f"{name} is missing" for name in sorted(missing) if not name.endswith(_EXTRA_STATE)]
    problems += [f"{name} has no place in the model" for name in sorted(left_over) if not name.endswith(_EXTRA_STATE)]
    check_fitting(directory, problems)
    if missing:
        logger.warning("%s holds no history of FP8's largest values: delayed scaling begins a new one", directory)


def check_fitting(directory: Path, problems: Sequence[str]) -> None:
    """Raises CheckpointError of what there is that keeps a checkpoint's weights from being those of its model."""
    if problems:
        raise CheckpointError(
            f"{directory}: {len(problems)} weights don't fit its {HF_DIRECTORY}/config.json, {_RESTORE}:\n"
            f"{listing(problems)}"
        )


def check_vocabulary(directory: Path, vocab_size: int) -> None:
    """Raises CheckpointError for another vocabulary than the saved one: padded, both may have the same shape."""
    stored = stored_vocab_size(directory)
    if stored != vocab_size:
        raise CheckpointError(
            f"{directory}: its weights have a vocabulary of {stored} entries, {HF_DIRECTORY}/config.json says "
            f"vocab_size = {vocab_size}, {_RESTORE}"
        )


@contextmanager
def readable(directory: Path, remedy: str) -> Iterator[None]:
    """Turns what Megatron and torch raise while they read `directory` into a CheckpointError with the remedy."""
    try:
        yield
    except (torch.OutOfMemoryError, MegaDPOError):
        raise
    except (CheckpointException, Exception) as error:
        # Torn pickles and archives raise anything, and neither Megatron's errors nor torch's (a BaseException with
        # every rank's traceback) say what to do.
        reason = _causes(error) if isinstance(error, CheckpointException) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"checkpoint {directory} can't be loaded: {reason}. It is damaged, or of a model of another shape; name "
            f"another one with {remedy}"
        ) from error


def _causes(error: CheckpointException) -> str:
    """What went wrong on each rank, said once."""
    return "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()))


def _load_optimizer(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Fills one distributed optimizer from its loaded state, which another kind of Adam may have saved.

    What goes wrong when Megatron does this by itself: with torch's AdamW it looks for a step counter among the loaded
    tensors, where there is none, and gives one counter to all parameters, which then counts N a step; groups lack the
    settings that only this kind of Adam has, and fused ones can't count in the fractions that AdamW saves.
    """
    parameter_state = state.pop("param_state")
    for group in state["optimizer"]["param_groups"]:
        group.update({key: value for key, value in optimizer.optimizer.defaults.items() if key not in group})
        group["step"] = int(group["step"])
    optimizer.load_state_dict(state)
    per_parameter = optimizer.optimizer.state.values()
    counters = [values.pop("step", None) for values in per_parameter]
    optimizer.load_parameter_state_from_fully_reshardable(parameter_state)
    for values, counter in zip(per_parameter, counters, strict=True):
        if counter is not None:
            values["step"] = counter.clone()


def _allocate_moments(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Gives every parameter zero moments and a step counter: Megatron can't describe a fresh torch AdamW."""
    for optimizer in optimizers:
        if isinstance(optimizer.optimizer, HostOptimizer):
            optimizer.optimizer.allocate()
        elif not optimizer.config.use_precision_aware_optimizer:  # which Megatron allocates while it loads
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                for group in optimizer.optimizer.param_groups:
                    group.setdefault("step", 0)
                    for parameter in group["params"]:
                        optimizer.optimizer.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32))


def _renew_main_weights(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Copies fp32 weights over the main weights that FusedAdam keeps of them and never updates.

    It makes main weights for every parameter and checkpoints are made of them, but it updates fp32 parameters in place
    (Transformer Engine 2.x).
    """
    for optimizer in optimizers:
        if optimizer.config.use_precision_aware_optimizer and not isinstance(optimizer.optimizer, HostOptimizer):
            for parameter, state in optimizer.optimizer.state.items():
                if parameter.dtype is torch.float32:
                    state["master_param"].copy_(parameter)
