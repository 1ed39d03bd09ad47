"""Runs a function on every rank of a small gloo world; ranks are forked from a server that has imported it all."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers.ports import free_port

CONTEXT = mp.get_context("forkserver")
# The server imports and computes nothing: its children start with warm modules and no threads of their own.
CONTEXT.set_forkserver_preload(["tests.helpers.preload"])


def launch(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 240.0,
    packages: Path | None = None,
) -> list[Any]:
    """What `function(*args)` returned on each rank, in rank order; the environment is torchrun's.

    With `packages` each rank is a fresh interpreter that looks there first for what it imports.

    `function` is a module-level one of a package that can be imported; it returns no tensors (they would travel as
    handles that die with the rank), numpy arrays do. A rank that raises ends the others; its traceback is the error.
    Ranks that are about to run out of time print where they are.
    """
    ranks = start_ranks(world_size, function, *args, late_s=0.95 * timeout_s, packages=packages)
    try:
        return _collect([rank.outcome for rank in ranks], time.monotonic() + timeout_s)
    finally:
        for rank in ranks:
            rank.process.join(timeout=5)
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()


# Starting a process, multiprocessing reads the status of every other one; one that two threads read at once is lost.
_STATUS = threading.Lock()


@dataclass(frozen=True)
class Rank:
    """A rank's process, and where what it returned arrives: (True, value) or (False, traceback)."""

    process: Any
    outcome: Connection

    def exit_code(self, timeout_s: float) -> int | None:
        """The status that it ended with; None where it runs after `timeout_s`. Several threads may have ranks."""
        wait([self.process.sentinel], timeout_s)
        with _STATUS:
            return self.process.exitcode


def start_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    late_s: float = 240.0,
    packages: Path | None = None,
) -> list[Rank]:
    """The ranks of a world that `launch` would wait for, started; those that last `late_s` print where they are."""
    port, ranks = free_port(), []
    context: Any = CONTEXT if packages is None else mp.get_context("spawn")
    for rank in range(world_size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(theirs, rank, world_size, port, late_s, function, args))
        # A spawned interpreter takes over the path of the one that starts it.
        with _STATUS, mock.patch.object(sys, "path", [*([] if packages is None else [str(packages)]), *sys.path]):
            process.start()
        theirs.close()
        ranks.append(Rank(process, mine))
    return ranks


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {[r for r in range(len(pipes)) if r not in results]} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    late_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(late_s)
    # Megatron writes them where a model is built, which tests do in the process that launches, too.
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        import torch

        torch.set_num_threads(1)
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
