"""Environment of every test: one thread a process, no network. Set before torch or transformers are imported."""

from __future__ import annotations

import os

import pytest

from megadpo.runtime.cpus import usable_cpus

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes outnumber the cores of a CI machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads and forked workers deadlock
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"

# A worker holds up to 3 GB with its fork server and ranks, and the longest file bounds what more of them save.
_MOST_WORKERS = 8


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `pytest -n auto`: half as many again as CPUs, since tests spend much time on waiting for processes."""
    return min(_MOST_WORKERS, (3 * usable_cpus() + 1) // 2)
