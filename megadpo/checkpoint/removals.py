"""Removes directories in the background: terabytes of old checkpoints take minutes on some disks."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)


class BackgroundRemoval:
    """Removes directories one after the other, in a thread that ends with the process; for one rank."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: list[Path] = []
        self._thread: threading.Thread | None = None

    def begin(self, directory: Path) -> None:
        """Queues a directory for removal, unless it is queued already or does not exist any more."""
        with self._lock:
            if directory in self._asked or not directory.exists():
                return
            self._asked.append(directory)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="removals", daemon=True)
                self._thread.start()

    def wait(self, wait_s: float) -> int:
        """Waits until all is removed, `wait_s` seconds at most; returns how many files and directories are left."""
        thread = self._thread
        if thread is not None:
            thread.join(wait_s)
        with self._lock:
            asked = list(self._asked)
        return sum(1 + len(files) for directory in asked for _, _, files in os.walk(directory)) or len(asked)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._asked:
                    self._thread = None
                    return
                directory = self._asked[0]
            _clear(directory)
            with self._lock:
                self._asked.remove(directory)


def _clear(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except Exception as error:  # in a thread that others wait for; for instance if an old file is still being read
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        logger.warning("%s can't be removed yet (%s): the next save tries again", directory, reason)
