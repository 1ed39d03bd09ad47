"""Memory and CPU time of processes, read from Linux's /proc."""

from __future__ import annotations

import os
from pathlib import Path

from megadpo.errors import MegaDPOError

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def high_water_bytes(pid: int) -> int:
    """The peak resident set of a process so far."""
    return _status_bytes(pid, "VmHWM:")


def resident_bytes(pid: int) -> int:
    """The current resident set of a process."""
    return _status_bytes(pid, "VmRSS:")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, in user and kernel mode."""
    after_name = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _TICKS_PER_S


def busy_cpu_seconds() -> float:
    """Busy CPU time of the machine since it started, summed over its CPUs."""
    user, nice, system, _idle, _iowait, irq, soft_irq, steal = map(int, _read("/proc/stat").split()[1:9])
    return (user + nice + system + irq + soft_irq + steal) / _TICKS_PER_S


def _status_bytes(pid: int, field: str) -> int:
    status = _read(f"/proc/{pid}/status")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MegaDPOError(f"{path} is not there: memory and CPU time are read from Linux's /proc") from None
