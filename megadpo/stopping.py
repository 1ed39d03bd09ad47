"""Ways to be told to stop: signals, and a budget of hours. All ranks of a run stop after the same update."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from megadpo.errors import Stopped, TrainingError
from megadpo.runtime.files import write_durably

# What schedulers send before they take the machines away: torchrun and Kubernetes, Slurm's --signal.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_OUT_OF_TIME = 1000.0
# Who signals all processes of a job reaches torchrun too, which passes the signal on: that is one wish, not two.
_ECHO_S = 2.0
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
    """The launch that this start belongs to, as an earlier start of it has noted it in `run_dir`; for one rank.

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
    """Notes for later starts of the same launch when it began, and what has stopped it; for one rank."""
    write_durably(run_dir / _LAUNCH, json.dumps(asdict(launch)) + "\n")


def forget_launch(run_dir: Path) -> None:
    """Takes the note away when the run has come to its end; for one rank."""
    (run_dir / _LAUNCH).unlink(missing_ok=True)


def _this_launch() -> Launch:
    """The launch of this process, by its parent under torchrun, by itself without."""
    id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    keeper = psutil.Process(os.getppid() if id else os.getpid())
    began = keeper.create_time()
    return Launch(id, socket.gethostname(), keeper.pid, began - psutil.boot_time(), began, time.time())


def _is_same(before: Launch, now: Launch) -> bool:
    """Whether a noted launch is the one of this start; never without torchrun, which alone starts ranks again.

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


class StopRequests:
    """Hears on this rank that it is to stop; a context manager, within which a first signal doesn't end the process.

    A second one, two seconds later or more, ends it at once, with the status that shells give for that signal,
    wherever the program is: a thread hears it, since Python itself handles signals only between the main thread's
    instructions, and one that waits for other ranks has none.
    """

    def __init__(self, *, max_hours: float | None, began: float) -> None:
        """`max_hours` count from `began`, in seconds since the epoch; null: no limit."""
        # Clocks are set now and then: what has passed before is taken from one, what passes from here on is measured.
        elapsed = max(0.0, time.time() - began)
        self._deadline = None if max_hours is None else time.monotonic() + 3600.0 * max_hours - elapsed
        self._max_hours = max_hours
        self._heard: int | None = None
        self._before: dict[signal.Signals, object] = {}
        self._asked = time.monotonic()
        self._longest_s = 0.0

    def __enter__(self) -> StopRequests:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _nothing)
        self._thread = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def vote(self, save_s: float) -> float:
        """What this rank votes for after an update: 0 to go on; else a number that `reason` knows.

        Out of time is who could not make another round like the longest between two votes so far, and then a save like
        the last one, which took `save_s` seconds.
        """
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._asked)
        self._asked = now
        if self._heard is not None:
            return float(self._heard)
        if self._deadline is not None and now + self._longest_s + save_s > self._deadline:
            return _OUT_OF_TIME
        return 0.0

    def reason(self, vote: float) -> str | None:
        """In words what the largest vote of all ranks says, None where it says to go on."""
        if vote == 0.0:
            return None
        return f"train.max_hours={self._max_hours:g}" if vote == _OUT_OF_TIME else signal.Signals(int(vote)).name

    def _listen(self) -> None:
        while heard := os.read(self._reader, 1):
            if heard[0] not in SIGNALS:
                continue
            if self._heard is None:
                self._heard, first = heard[0], time.monotonic()
            elif time.monotonic() - first > _ECHO_S:
                os._exit(128 + heard[0])


def _nothing(number: int, frame: FrameType | None) -> None:
    """The thread has heard it."""
