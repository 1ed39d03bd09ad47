"""Environment of every test: this clone, one thread a process, no network. Set before torch is imported."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

from megadpo.runtime.cpus import usable_cpus

# What a launcher, a scheduler or the scripts in docker/ have set around the tests; what tests start would obey it.
_OF_OTHERS = ("SLURM_", "SBATCH_", "PET_", "TORCHELASTIC_", "TORCH_ELASTIC_", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")
_OF_SCRIPTS = (
    *("NNODES", "NODE_RANK", "HEAD", "RUN_ID", "RANKS_PER_NODE", "NODE_ADDRESS", "JOIN_TIMEOUT_S", "MAX_RESTARTS"),
    *("SAVE_WITHIN_S", "RUN_DIR", "IMAGE", "MOUNTS", "REPOSITORY", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
)
for _name in list(os.environ):
    if _name in ("RANK", "WORLD_SIZE", *_OF_SCRIPTS) or _name.startswith(_OF_OTHERS):
        del os.environ[_name]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes outnumber the cores of a CI machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads and forked workers deadlock
# Runs are eager (`megatron_device`); where nothing can be compiled, Megatron is imported a second faster.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"
# Processes that tests start use this clone's package, too, whichever the environment has installed.
_SEARCHED = (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _SEARCHED))


def pytest_configure(config: pytest.Config) -> None:
    """Refuses a temporary folder that can't stand in `key=value` as it is: tests write paths into such words."""
    root = config.getoption("basetemp") or tempfile.gettempdir()
    if not re.fullmatch(r"[\w./+ -]+", str(root), re.ASCII):
        raise pytest.UsageError(
            f"temporary files would go to {root}: tests need a path of ASCII letters, digits and ._+-/: "
            "set TMPDIR or --basetemp"
        )


# A worker holds up to 3 GB with its fork server and ranks, and the longest file bounds what more of them save.
_MOST_WORKERS = 8


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `pytest -n auto`: one a CPU. A worker's ranks keep one busy; more workers only get in their way."""
    return min(_MOST_WORKERS, usable_cpus())
