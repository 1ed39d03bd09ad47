"""Tests, tools and the environment are those of the clone that they are started from, whatever else is installed."""

from __future__ import annotations

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megadpo
from tests.helpers.launch import launch

ROOT = Path(__file__).resolve().parents[2]
# Modules that programs of tools/bench/ start with -m have the path from them.
PROGRAMS = [
    path
    for path in sorted((ROOT / "tools").rglob("*.py"))
    if '__name__ == "__main__"' in (text := path.read_text()) and "from megadpo" in text and "_child" not in path.stem
]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.path_dependent
def test_tests_and_what_they_start_use_this_clone(tmp_path: Path) -> None:
    own = str(ROOT / "megadpo" / "__init__.py")
    assert megadpo.__file__ == own
    assert launch(1, pkgutil.resolve_name, "megadpo:__file__") == [own]
    assert run(sys.executable, "-c", "import megadpo; print(megadpo.__file__)", cwd=tmp_path) == f"{own}\n"


@pytest.mark.path_dependent
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_uses_its_own_clone(program: Path, tmp_path: Path) -> None:
    depth = len(program.relative_to(ROOT).parts) - 1
    before, line, _ = program.read_text().partition(
        f"sys.path.insert(0, str(Path(__file__).resolve().parents[{depth}]))"
    )
    assert line and "from megadpo" not in before and "from bench" not in before
    if depth == 1:  # the others import torch for their --help
        other = tmp_path / "megadpo" / "__init__.py"
        other.parent.mkdir()
        other.write_text("raise ImportError('the package of another clone')")
        assert program.name in run(sys.executable, program, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))


def make(*words: str, cwd: Path) -> str:
    """What make prints, as when it is not called by another one."""
    return run("make", *words, cwd=cwd, MAKEFLAGS="", MAKELEVEL="0", LC_ALL="C.UTF-8")


def test_an_environment_that_was_moved_is_made_anew(tmp_path: Path) -> None:
    clone, moved, other = (tmp_path / name for name in ("a, b (é)", "an 'other' $place", "third"))
    for root in (clone, other):
        root.mkdir()
        for name in ("Makefile", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, root)
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(shutil.which("true") or "")  # in place of pip
    make("venv", cwd=clone)
    assert "Nothing to be done" in make("-n", "venv", cwd=clone)

    clone.rename(moved)
    planned = make("-n", "venv", cwd=moved)
    assert f".venv was made as {clone}/.venv: it is made anew" in planned
    assert planned.index("rm -rf .venv\n") < planned.index("-m venv .venv") < planned.index("pip install")

    (moved / ".venv" / ".installed").unlink()
    make("venv", cwd=moved)
    (other / ".venv").symlink_to(moved / ".venv")
    assert "Nothing to be done" in make("-n", "venv", cwd=other)
