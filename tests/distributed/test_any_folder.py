"""A clone works from any folder: from a copy with a difficult path, within a job, and without writing to it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.pairs import make_pairs
from tests.helpers.runs import training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
# What a clone holds besides its sources.
_NOT_SOURCES = (".git", ".venv*", "outputs", "wandb", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
# A job on several nodes that was started by docker/slurm/train.sbatch, and torchrun's settings of another cluster.
_JOB = dict(
    setting.split("=")
    for setting in """
    SLURM_JOB_ID=12 SLURM_NODEID=3 SLURM_JOB_NUM_NODES=8 SLURM_SUBMIT_DIR=/elsewhere
    NNODES=8 NODE_RANK=3 HEAD=node0:29400 REPOSITORY=/elsewhere IMAGE=a.sqsh
    RANK=3 WORLD_SIZE=8 LOCAL_RANK=3 PET_NNODES=8 PET_NPROC_PER_NODE=8
    """.split()
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any folder")


@pytest.fixture(scope="module")
def clone(root: Path) -> Iterator[Path]:
    """A copy of this clone in a folder named megadpo below one with a blank and an é, as seen through a link."""
    home = root / "a b é"
    copy_sources(home / "megadpo")
    (root / "λink").symlink_to(home)
    yield root / "λink" / "megadpo"
    set_writable(home / "megadpo", True)


def copy_sources(to: Path) -> None:
    """Copies the files that git knows, or, where there is no repository, all that is not made by working with them."""
    listed = b""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout
    if not listed:
        shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*_NOT_SOURCES), symlinks=True)
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def set_writable(tree: Path, writable: bool) -> None:
    for path in [tree, *tree.rglob("*")]:
        mode = path.stat().st_mode
        path.chmod(mode | 0o200 if writable else mode & ~0o222)


def listing(tree: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, but for the bytecode that Python keeps beside sources where it can."""
    files = (path for path in tree.resolve().rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def bound_by_permissions() -> None:
    """In a child of root: write permissions hold for what it starts, too."""
    drop_from_bounding_set, dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


def run(root: Path, cwd: Path, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in an environment that has another clone's package first and a difficult temporary folder."""
    other, temporary = root / "other" / "megadpo", root / "tmp λ"
    other.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    (other / "__init__.py").write_text("raise ImportError('the package of another clone')")
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTHONDONTWRITEBYTECODE")
    }
    return subprocess.run(
        command,
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(other.parent), "TMPDIR": str(temporary), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=bound_by_permissions,
    )


def pytest_command(*words: str | Path) -> list[str | Path]:
    """pytest without what the project adds to a run of the whole suite."""
    plain = ("-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-p", "no:xdist")
    return [sys.executable, "-m", "pytest", *plain, *words]


def test_path_dependent_tests_pass(root: Path, clone: Path) -> None:
    """Collecting only the files that have any: to import all takes longer than to run these."""
    files = [path.relative_to(clone) for path in (clone / "tests").rglob("test_*.py")]
    files = [path for path in files if "@pytest.mark.path_dependent" in (clone / path).read_text(encoding="utf-8")]
    assert len(files) >= 5
    before = listing(clone)
    done = run(root, clone, *pytest_command("-m", "path_dependent", f"--basetemp={root / 'b t'}", *files), **_JOB)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
    assert listing(clone) == before


def test_tests_refuse_a_temporary_folder_that_words_can_not_name(root: Path, clone: Path) -> None:
    done = run(root, clone, *pytest_command("tests/unit"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"temporary files would go to {root / 'tmp λ'}: tests need a path of ASCII letters" in done.stdout


def test_two_ranks_train_from_it_and_write_nothing_there(root: Path, clone: Path) -> None:
    """The second half without write permission. The run directory is a link in the one, what it names in the other."""
    work, run_dir = root / "work é", root / "work é" / "runs" / "run"
    run_dir.mkdir(parents=True)
    (work / "link").symlink_to(run_dir)
    write_tiny_model(work / "model", "llama", num_layers=2)
    write_jsonl(work / "pairs.jsonl", make_pairs(8, seed=3))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = (
        *("+model=hf", "model.hf_path=model", "data.train_path=pairs.jsonl", "data.workers=1", "parallel.tensor=2"),
        *("device.kind=cpu", "precision.dtype=fp32", "trackers=[jsonl,tensorboard]", "train.resume=auto"),
        *("train.global_batch_size=4", "data.tokens_per_microbatch=600"),
    )
    job = {name: value for name, value in _JOB.items() if name.startswith("SLURM_")}
    before = listing(clone)

    def train(run_dir: str, steps: int) -> None:
        own = (f"train.run_dir={run_dir}", f"train.max_steps={steps}")
        done = run(root, work, *launcher, clone / "tools" / "train.py", *words, *own, **job)
        assert done.returncode == 0, done.stdout
        assert listing(clone) == before

    train("link", 1)
    set_writable(clone.resolve(), False)
    probe = clone / "megadpo" / "probe"
    if run(root, work, "touch", probe).returncode == 0:
        probe.unlink()
        pytest.skip("permissions do not bind this user")
    train("runs/run", 2)
    assert [line["step"] for line in training_lines(run_dir)] == [1, 2]
    assert (run_dir / "hf" / "model.safetensors").is_file()
    assert {path.name for path in work.iterdir()} == {"link", "model", "pairs.jsonl", "runs"}
