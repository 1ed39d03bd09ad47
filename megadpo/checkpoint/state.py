"""State of a model and its optimizer for checkpoints in Megatron's distributed format, and loading it in any layout."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megadpo.checkpoint.description import stored_vocab_size
from megadpo.checkpoint.directory import HF_DIRECTORY
from megadpo.checkpoint.manifest import Damage, DamageKind, find_damage
from megadpo.checkpoint.writer import METADATA, causes_of, raise_own
from megadpo.errors import CheckpointError, MegaDPOError, listing
from megadpo.optimizer.build import distributed_optimizers
from megadpo.optimizer.host_offload import HostOptimizer
from megadpo.runtime.collectives import on_main
from megadpo.runtime.pickles import data_only_unpickling
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

_RESTORE = "which is not the file that they were saved with: bring that one back, or name another checkpoint"
WEIGHTS_FROM = "model.checkpoint=DIR (--checkpoint DIR)"
# Suffix of the state that Transformer Engine's modules have besides their parameters.
_EXTRA_STATE = "_extra_state"
# Keys in a checkpoint that are not weights of its model.
_REFERENCE = "reference."
NOT_WEIGHTS = ("optimizer.", _REFERENCE)


def model_state(modules: Sequence[MegatronModule]) -> dict[str, Any]:
    """Sharded state of this rank's chunks; tensors have global names, so the layout is not part of the format.

    Transformer Engine's modules have additional state, which is empty except for FP8's delayed scaling. It is a pickle,
    which they would load without any checks, so it is left out, and never read from a checkpoint.
    """
    return {
        f"model{index}": {
            name: value
            for name, value in module.sharded_state_dict(metadata=dict(METADATA)).items()
            if not name.endswith(_EXTRA_STATE)
        }
        for index, module in enumerate(modules)
    }


def reference_state(modules: Sequence[MegatronModule]) -> dict[str, Any]:
    """Sharded state of a reference's chunks, under its own names; {} without any."""
    state = {f"reference_{name}": chunk for name, chunk in model_state(modules).items()}
    add_prefix_for_sharding(state, _REFERENCE)
    return state


def _has_amax_history(module: MegatronModule) -> bool:
    return bool(module.config.fp8) and module.config.fp8_recipe == "delayed"


def _fill(modules: Sequence[MegatronModule], loaded: dict[str, Any]) -> None:
    """Copies a loaded `model_state` into the modules."""
    for index, module in enumerate(modules):
        missing, unexpected = module.load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected and all(name.endswith(_EXTRA_STATE) for name in missing)


def damage_of(directory: Path) -> list[Damage]:
    """The damage of a checkpoint's files, the same on every rank; [] where they are those that were written.

    Files of hf/ may be changed on purpose, for instance a chat template; that is logged, and no damage. Every rank
    reads its share of the bytes. Raises CheckpointError on every rank if one can't read, since then a machine or the
    file system may be at fault and the checkpoint intact. One all-gather over the world.
    """
    found, unread = _damage_seen_here(directory)
    of_ranks: list[tuple[list[Damage], list[str]]] = [([], [])] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (found, unread))
    if unread := [line for _, lines in of_ranks for line in lines]:
        raise CheckpointError(
            f"checkpoint {directory} can't be read now, which does not say that it is damaged: look after the file "
            "system and the machines that are named, and start again; if it stays so, bring its files back, or take it "
            f"out of its directory as a damaged one:\n{listing(unread)}"
        )
    found = list(dict.fromkeys(damage for own, _ in of_ranks for damage in own))
    changed = [damage.text for damage in found if damage.kind is DamageKind.side_file]
    if changed:
        logger.warning("%s was changed since it was written, and is used as it is:\n%s", directory, listing(changed))
    return [damage for damage in found if damage.kind is not DamageKind.side_file]


def _damage_seen_here(directory: Path) -> tuple[list[Damage], list[str]]:
    """The damage that this rank finds in a checkpoint, and the files that it can't read, with the rank's name."""
    try:
        return find_damage(directory, share=dist.get_rank(), shares=dist.get_world_size(), free=HF_DIRECTORY), []
    except OSError as error:
        here = f"rank {dist.get_rank()} ({socket.gethostname()})"
        return [], [f"{here}: {error.filename or directory} can't be read now ({error.strerror or error})"]


def check_undamaged(directory: Path, remedy: str) -> None:
    """Raises CheckpointError on every rank if a checkpoint's files are not those that were written."""
    if damage := damage_of(directory):
        raise CheckpointError(
            f"checkpoint {directory} is damaged, name another one with {remedy}, or copy this one again:\n"
            f"{listing([found.text for found in damage])}"
        )


def load_checkpoint(directory: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Loads weights, main weights and moments from a checkpoint of any layout. Collective over all ranks."""
    inner = distributed_optimizers(optimizer)
    _allocate_moments(inner)
    model = model_state([chunk.module for chunk in chunks])
    content = {
        **model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=dict(METADATA)),
    }
    with readable(directory, "train.resume=DIR"):
        loaded, left_over, missing = dist_checkpointing.load(content, str(directory), strict="return_all")
    _check_names(directory, [name for name in left_over if not name.startswith(_REFERENCE)], missing)
    _fill([chunk.module for chunk in chunks], loaded)
    if any(_has_amax_history(chunk.module) for chunk in chunks):
        logger.warning("delayed scaling begins a new history of FP8's largest values: none is taken from %s", directory)
    states = [loaded["optimizer"]] if len(inner) == 1 else list(loaded["optimizer"].values())
    for member, member_state in zip(inner, states, strict=True):
        _load_optimizer(member, member_state)


def load_reference(directory: Path, modules: Sequence[MegatronModule]) -> None:
    """Loads a reference's chunks that were saved with a policy. Collective over all ranks."""
    with readable(directory, "train.resume=DIR"):
        loaded, left_over, missing = dist_checkpointing.load(
            reference_state(modules), str(directory), strict="return_all"
        )
    _check_names(directory, [name for name in left_over if name.startswith(_REFERENCE)], missing)
    _fill(modules, {name.removeprefix("reference_"): chunk for name, chunk in loaded.items()})


def load_weights(directory: Path, modules: Sequence[MegatronModule], *, vocab_size: int) -> None:
    """Overwrites the modules' weights with a checkpoint's, of any layout and cast to theirs; its optimizer is not read.

    Raises the same CheckpointError on every rank unless the checkpoint holds exactly the weights of this model, whose
    vocabulary has `vocab_size` entries without padding. Collective over all ranks.
    """
    check_undamaged(directory, WEIGHTS_FROM)
    on_main(lambda: check_vocabulary(directory, vocab_size))
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.zero_()  # padding that the layout of the checkpoint does not have
    with readable(directory, WEIGHTS_FROM):
        loaded, left_over, missing = dist_checkpointing.load(model_state(modules), str(directory), strict="return_all")
    _check_names(directory, {name for name in left_over if not name.startswith(NOT_WEIGHTS)}, missing)
    _fill(modules, loaded)


def _check_names(directory: Path, left_over: Collection[str], missing: Collection[str]) -> None:
    """Raises CheckpointError if a checkpoint holds more or less than the model, FP8's amax histories aside."""
    problems = [f"{name} is missing" for name in sorted(missing)]
    problems += [f"{name} has no place in the model" for name in sorted(left_over) if not name.endswith(_EXTRA_STATE)]
    check_fitting(directory, problems)


def check_fitting(directory: Path, problems: Sequence[str]) -> None:
    """Raises CheckpointError if there are problems because of which a checkpoint's weights don't fit its model."""
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
    """Turns what Megatron and torch raise while they read `directory` into a CheckpointError with the remedy.

    Pickles are restricted to data, see `data_only_unpickling`, and only files are read, since a pipe would block.
    Errors of collectives, for instance if another rank has died, say nothing about the checkpoint and pass unchanged.
    """
    odd = [path.name for path in sorted(directory.glob("*")) if not (path.is_file() or path.is_dir())]
    if odd:
        raise CheckpointError(f"checkpoint {directory}: {odd[0]} is not a file; name another one with {remedy}")
    try:
        with data_only_unpickling(directory):
            yield
    except (torch.OutOfMemoryError, MegaDPOError):
        raise
    except (CheckpointException, Exception) as error:
        if isinstance(error, CheckpointException):
            raise_own(error)
        if _is_of_collectives(error):
            raise
        # Torn pickles and archives may raise any error, and neither Megatron's errors nor torch's (a BaseException with
        # every rank's traceback) name a remedy.
        reason = causes_of(error) if isinstance(error, CheckpointException) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"checkpoint {directory} can't be loaded: {reason}. A rank or the file system may have failed: look for "
            f"what was said first; if it is of a model of another shape, name another one with {remedy}"
        ) from error


def _is_of_collectives(error: BaseException) -> bool:
    """True for an error of communication between ranks; gloo's has no type of its own, but its origin tells."""
    if isinstance(error, CheckpointException):
        return any(_is_communication(cause, trace) for cause, trace in error.failures.values())
    return _is_communication(error, traceback.extract_tb(error.__traceback__))


def _is_communication(error: BaseException, trace: traceback.StackSummary) -> bool:
    return isinstance(error, dist.DistError) or (bool(trace) and trace[-1].filename == dist.distributed_c10d.__file__)


def _load_optimizer(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Loads one distributed optimizer from its loaded state, which another kind of Adam may have saved.

    Megatron's own loading has three faults: with torch's AdamW it looks for a step counter among the loaded tensors,
    where there is none, and gives all parameters one shared counter, which then advances by N in a step; groups lack
    settings that only this kind of Adam has; and fused ones can't count in the floats that AdamW saves.
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
    """Gives every parameter zero moments and a step counter, since Megatron needs them to describe a torch AdamW."""
    for optimizer in optimizers:
        if isinstance(optimizer.optimizer, HostOptimizer):
            optimizer.optimizer.allocate()
        elif not optimizer.config.use_precision_aware_optimizer:  # Megatron allocates its state while loading
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                for group in optimizer.optimizer.param_groups:
                    group.setdefault("step", 0)
                    for parameter in group["params"]:
                        optimizer.optimizer.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32))


def renew_main_weights(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Copies fp32 weights to the main weights that FusedAdam keeps of them but never updates.

    It creates main weights for every parameter, and checkpoints hold them, but it updates fp32 parameters in place
    (Transformer Engine 2.x).
    """
    for optimizer in optimizers:
        if optimizer.config.use_precision_aware_optimizer and not isinstance(optimizer.optimizer, HostOptimizer):
            for parameter, state in optimizer.optimizer.state.items():
                if parameter.dtype is torch.float32:
                    state["master_param"].copy_(parameter)
