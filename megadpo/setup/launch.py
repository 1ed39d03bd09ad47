"""Tells one start of torchrun from another: ranks that it restarts resume, unless the launch was meant to stop."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megadpo.errors import Stopped, TrainingError
from megadpo.runtime.files import write_durably

_LAUNCH = ".launch.json"
# The kernel tells in whole seconds when the machine started, and not always the same one.
_ROUNDING_S = 3.0


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of torchrun, which may start its ranks several times; without torchrun, one start of this program.

    `id` is torchrun's name for it, "" without; `host` and `pid` are of the process that keeps rank 0, which started
    `uptime` seconds after the machine, at `began`; at `met` its first ranks had found each other (both in seconds since
    the epoch). `stopped` is what has stopped it, None as long as nothing has; `wrong`: it was an error in its numbers.
    """

    id: str
    host: str
    pid: int
    uptime: float
    began: float
    met: float
    stopped: str | None = None
    wrong: bool = False


def find_launch(run_dir: Path) -> Launch:
    """The launch that this start belongs to, as an earlier start of it noted it in `run_dir`; for one rank.

    Raises where an earlier start of the same launch was told to stop (Stopped) or has found its numbers wrong
    (TrainingError): torchrun takes any status but 0 for a failure, and would begin again what was just ended.
    """
    launch, before = _this_launch(), _read(run_dir)
    if before is None or not _is_same(before, launch):
        forget_launch(run_dir)
        return launch
    if before.stopped is not None:
        said = f"this launch was stopped by {before.stopped}: it is not begun again"
        raise TrainingError(f"{said}; what was found is in the log before") if before.wrong else Stopped(said)
    return before


def note_launch(run_dir: Path, launch: Launch) -> None:
    """Notes in the run directory when the launch began, and what has stopped it; for one rank."""
    write_durably(run_dir / _LAUNCH, json.dumps(asdict(launch)) + "\n")


def forget_launch(run_dir: Path) -> None:
    """Removes the note of a finished run; for one rank."""
    (run_dir / _LAUNCH).unlink(missing_ok=True)


def _this_launch() -> Launch:
    """The launch of this process, by its parent under torchrun, by itself without."""
    id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    keeper = psutil.Process(os.getppid() if id else os.getpid())
    began = keeper.create_time()
    return Launch(id, socket.gethostname(), keeper.pid, began - psutil.boot_time(), began, time.time())


def _is_same(before: Launch, now: Launch) -> bool:
    """True if a noted launch is the one of this start; never without torchrun, which alone restarts ranks.

    torchrun's ids come again, and its count of restarts rises only on the machine whose rank has failed: what tells
    launches of one machine apart is the agent. Where rank 0 was on another machine before, the agent here belongs to
    the launch if it was there already when that had met.
    """
    if not now.id or before.id != now.id:
        return False
    if before.host != now.host:
        return now.began < before.met
    # Process ids come again, and clocks are set: what is counted from the machine's start stays, but for rounding.
    return before.pid == now.pid and abs(before.uptime - now.uptime) < _ROUNDING_S


def _read(run_dir: Path) -> Launch | None:
    try:
        return Launch(**json.loads((run_dir / _LAUNCH).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # no note, or a torn one, or another version's
        return None
