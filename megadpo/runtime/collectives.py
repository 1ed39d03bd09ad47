"""Collectives of this project: agreement of all ranks on a value, votes, and one gather for all logged metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megadpo.errors import ConfigError, MegaDPOError

T = TypeVar("T")


def broadcast_from_main(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Returns rank 0's picklable `value` on every rank. One broadcast, over the world or a `group` of all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def on_main(action: Callable[[], T], *, patience_s: float | None = None) -> T:
    """Runs `action` on rank 0 and returns its result on every rank, or raises its MegaDPOError or OSError there.

    The other ranks wait as long as in any collective, or `patience_s` seconds in a group made for this call.
    """
    if patience_s is not None:
        patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience_s))
        try:
            return _on_main(action, patient)
        finally:
            dist.destroy_process_group(patient)
    return _on_main(action, None)


def _on_main(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    outcome: T | MegaDPOError | None = None
    if dist.get_rank() == 0:
        try:
            outcome = action()
        except MegaDPOError as error:
            outcome = error
        except OSError as error:
            outcome = MegaDPOError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    outcome = broadcast_from_main(outcome, group)
    if isinstance(outcome, MegaDPOError):
        raise outcome
    return cast(T, outcome)


def on_every(action: Callable[[], T]) -> T:
    """Runs `action` on every rank and returns its result; if any rank has a MegaDPOError, all raise the lowest rank's.

    One all-gather over the world.
    """
    result, failure = None, None
    try:
        result = action()
    except MegaDPOError as error:
        failure = error
    failures: list[MegaDPOError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            raise found
    return cast(T, result)


def check_all_agree(what: str, content: str) -> None:
    """Raises ConfigError on every rank unless all ranks hold the same `content`; names those that differ.

    One all-gather of a digest over the world.
    """
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(content.encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ConfigError(
            f"ranks {different} see another {what} than rank 0. Start every rank with the same command line, code and "
            f"files (on several machines: a shared file system, or equal copies)."
        )


def largest_over_ranks(values_K: torch.Tensor) -> torch.Tensor:
    """Element-wise maximum of all ranks' values, which must be finite; on every rank and on the values' device.

    One all-reduce over the world, which the host does not wait for.
    """
    largest_K = values_K.clone()
    dist.all_reduce(largest_K, dist.ReduceOp.MAX)
    return largest_K


def own_store() -> dist.Store:
    """The store of the default process group, on a new connection that this process uses for nothing else."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined] # the stubs lack it


def gather_rows(row_K: torch.Tensor) -> torch.Tensor:
    """Returns all ranks' [K] vectors as [world, K] on every rank. One all-gather over the world."""
    rows = [torch.empty_like(row_K) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row_K)
    return torch.stack(rows)
