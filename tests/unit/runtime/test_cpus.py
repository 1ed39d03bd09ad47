"""CPUs that a process may use, from its affinity mask and made-up control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megadpo.runtime.cpus import usable_cpus


@pytest.fixture(autouse=True)
def _eight_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def cpus(root: Path, membership: str, files: dict[str, str]) -> int:
    """What a process of these control groups may use; files are given by their path below the mount."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "membership").write_text(membership)
    return usable_cpus(cgroups=root, membership=root / "membership")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),  # a quota beyond the mask
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "500000 100000\n"}, 5),  # a group around it
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "500000 100000\n"}, 4),
        ("0::/host/path\n", {"cpu.max": "200000 100000\n"}, 2),  # a container that sees its own group as the root
        ("0::/a\n", {"b/cpu.max": "200000 100000\n"}, 8),  # somebody else's
    ],
)
def test_version_2(membership: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert cpus(tmp_path, membership, files) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("250000", 3)])
def test_version_1(quota: str, expected: int, tmp_path: Path) -> None:
    membership = "4:memory:/m\n3:cpu,cpuacct:/docker/x\n0::/\n"
    files = {"cpu/cpu.cfs_quota_us": f"{quota}\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert cpus(tmp_path, membership, files) == expected


def test_without_control_groups_the_mask_counts(tmp_path: Path) -> None:
    assert usable_cpus(cgroups=tmp_path, membership=tmp_path / "none") == 8
