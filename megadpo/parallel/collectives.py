"""Collectives of our own: agreement of all ranks on a value, and one gather for everything that is logged."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
import torch.distributed as dist

from megadpo.errors import ConfigError

T = TypeVar("T")


def broadcast_from_main(value: T) -> T:
    """Rank 0's picklable `value`, on every rank. One object broadcast over the world."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


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


def gather_rows(row_K: torch.Tensor) -> torch.Tensor:
    """All ranks' [K] vectors as [world, K], on every rank. One all-gather over the world."""
    rows = [torch.empty_like(row_K) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row_K)
    return torch.stack(rows)
