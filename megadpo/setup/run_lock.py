"""The lock of a run directory: one run at a time has it, and the kernel releases it however that run's process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from megadpo.errors import ConfigError
from megadpo.runtime.files import writing
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

LOCK = ".lock"
# What file systems say that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run directory for the duration of the context; for one process of a run.

    ConfigError where another run holds it. The kernel lets go of it when the process ends, by whatever.
    """
    path = run_dir / LOCK
    with writing(path, ConfigError):
        file = _lock(path)
    try:
        yield
    finally:
        if file is not None:
            with suppress(FileNotFoundError):
                path.unlink()
            file.close()


def _lock(path: Path) -> TextIO | None:
    """The file that is locked; None where the file system has no locks."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno in _NO_LOCKS:
                logger.warning("%s has no locks: see to it that no two runs write to it", path.parent)
                return None
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"train.run_dir={path.parent}: is in use by {holder}: wait for its end, or give another directory"
                ) from None
            raise
        # Whoever held it before may have taken the name away between the two calls.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                file.write(
                    f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
                )
                file.flush()
                return file
        file.close()
