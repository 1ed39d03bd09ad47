"""The number of CPUs that this process may use, from its affinity mask and the quota of its control group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cpus(*, cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Number of CPUs that the affinity mask and the quota allow this process; a quota of 1.5 CPUs counts as 2.

    Containers are mostly limited by a quota; the mask then still shows every CPU of the machine. `cgroups` is the mount
    point of control groups (version 1 or 2), `membership` the file that names this process's own.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _quotas(cgroups, membership))]))


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """Quotas, in CPUs, of this process's control group and of each group around it."""
    for group in _groups(cgroups, membership):
        with suppress(OSError, ValueError):  # no such file, or no limit: "max 100000"
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # -1: no limit
                yield int(quota) / int(period)


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Directories of the control groups that limit this process's CPU time, innermost first.

    A container may see its own group as the root, or by a path that does not exist inside it; its ancestors' paths do.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        own = root / path.lstrip("/")
        yield from (own, *(parent for parent in own.parents if parent.is_relative_to(root)))
