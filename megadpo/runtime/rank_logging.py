"""Logging for many ranks: everything from global rank 0, errors with the rank's number from the others."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

from megadpo.errors import redact, visible

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def global_rank() -> int:
    """Rank of this process as the launcher has set it (RANK); 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of processes that the launcher has started; 1 without a launcher (RANK is not set)."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def launched_restarts() -> int:
    """Number of times that the launcher restarts failed ranks; 0 without a launcher."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


class _StderrHandler(logging.StreamHandler):
    """Writes to the current sys.stderr, which a progress bar replaces while it draws."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _Formatter(logging.Formatter):
    """Hides secrets and control characters: names in files may come from strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(redact(super().format(record)))


def configure_logging(level: int = logging.INFO) -> None:
    """Sends `megadpo` loggers to stderr: all of `level` from rank 0, errors with the rank from others."""
    logger = logging.getLogger("megadpo")
    logger.handlers.clear()
    handler = _StderrHandler()
    rank = global_rank()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.ERROR)
    logger.propagate = False


def silence_libraries() -> None:
    """Hides warnings of Megatron and torch that a user can do nothing about, and transformers' progress bars.

    This project itself says what they announce (no Transformer Engine, no apex, renamed collectives) where it matters.
    Warnings of other modules stay.
    """
    for module in (r"megatron\.", r"torch\.distributed\.", r"torch\.jit\."):
        warnings.filterwarnings("ignore", module=module)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is the module's `__name__`."""
    return logging.getLogger(name)
