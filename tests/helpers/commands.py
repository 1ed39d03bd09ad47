"""Runs a command-line tool on the ranks of a test, without the seconds that a fresh interpreter takes."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path


def run_tool(name: str, words: Sequence[str], directory: Path) -> str:
    """Runs tools/NAME.py's `main` on this rank in `directory`; the log. RuntimeError unless its exit status is 0."""
    os.chdir(directory)
    log = io.StringIO()
    with redirect_stderr(log):
        status = import_module(f"tools.{name}").main(list(words))
    if status != 0:
        raise RuntimeError(f"tools/{name}.py: exit status {status}\n{log.getvalue()}")
    return log.getvalue()
