"""What the ranks of the planner's tests do."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch.distributed as dist


def end_left_world() -> None:
    """Ends the process group that a command which failed in this process has left standing, as it does for its peers'
    sake; plans are made where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def measured_peak(case: Any) -> dict[str, int]:
    """The rank's part of a `bench.peak_child.PeakCase`; the importer has put tools/ on the path."""
    from bench.peak_child import measure

    return measure(case)


def dry_run(words: list[str]) -> tuple[int, str, str]:
    """tools/train.py with the words: its exit status, what it printed and what it logged."""
    from tools.train import main

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(words)
    return status, out.getvalue(), err.getvalue()
