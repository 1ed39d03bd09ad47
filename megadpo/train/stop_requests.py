"""Requests to stop: signals, and a budget of hours. All ranks of a run stop after the same update."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

# What schedulers send before they take the machines away: torchrun and Kubernetes, Slurm's --signal.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# The vote of a rank whose hours are over: above the number of every signal, so that it is heard beside one.
_OUT_OF_TIME = 1000.0
# Who signals all processes of a job reaches torchrun too, which passes the signal on: that is one wish, not two.
_ECHO_S = 2.0


class StopRequests:
    """Collects this rank's reasons to stop; a context manager, within which a first signal doesn't end the process.

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
            self._before[number] = signal.signal(number, _ignore)
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
        """This rank's vote after an update: 0 to go on; else a number that `reason` knows.

        A rank is out of time when it could not make another round like the longest between two votes so far, and then a
        save like the last one, which took `save_s` seconds.
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
        """The reason to stop that the largest vote of all ranks stands for, in words; None to go on."""
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


def _ignore(number: int, frame: FrameType | None) -> None:
    """Does nothing: the thread reads the signal's number from the wakeup pipe."""
