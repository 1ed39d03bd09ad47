"""kill -9 of ranks of whole runs: the others end soon, and what torchrun or anybody starts again ends as if unhurt.

Equal is bit for bit: exported weights, metrics, and the last checkpoint with its moments.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megadpo.checkpoint.directory import step_directories, step_directory, step_of
from megadpo.checkpoint.manifest import find_damage
from tests.faults.cases.doomed import train_and_die
from tests.helpers.cluster import LAUNCH, environment
from tests.helpers.jobs.training import train
from tests.helpers.launch import Rank, launch, start_ranks
from tests.helpers.pairs import make_pairs
from tests.helpers.ports import free_port
from tests.helpers.runs import assert_bit_equal, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

ENDS_BY_ITSELF_S = 30.0
STEPS = 4
LAYOUTS = {"dp2": [], "tp2": ["parallel.tensor=2"], "pp2": ["parallel.pipeline=2"]}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all runs here have in common, but for layout and run directory."""
    root = tmp_path_factory.mktemp("killed")
    model = write_tiny_model(root / "model", "llama", num_layers=2)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(10, seed=5))
    common = ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu"]
    common += ["precision.dtype=fp32", "trackers=[jsonl]", "optimizer.lr=1e-3", f"train.max_steps={STEPS}"]
    return [*common, "train.global_batch_size=4", "train.save_every=1", "train.resume=auto", "data.workers=1"]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of every layout, and of one rank."""
    root = tmp_path_factory.mktemp("whole")
    for name, layout in LAYOUTS.items():
        launch(2, train, [*words, *layout, f"train.run_dir={root / name}"])
    launch(1, train, [*words, f"train.run_dir={root / 'one'}"])
    return {name: root / name for name in (*LAYOUTS, "one")}


def end_of(ranks: list[Rank]) -> list[int]:
    """The ranks' exit statuses, of which the first to end is a kill's, and the others follow it soon by themselves."""
    deadline = time.monotonic() + 60
    while all(rank.process.is_alive() for rank in ranks):
        assert time.monotonic() < deadline, "nobody was killed"
        time.sleep(0.01)
    for rank in ranks:
        rank.process.join(ENDS_BY_ITSELF_S)
    codes = [rank.process.exitcode for rank in ranks]
    for rank in ranks:
        rank.process.kill()
    return codes


@pytest.mark.parametrize(("layout", "rank"), [("dp2", 1), ("tp2", 0), ("pp2", 0)])
def test_others_end_when_a_rank_is_killed_in_a_step(
    layout: str, rank: int, words: list[str], whole: dict[str, Path], tmp_path: Path
) -> None:
    own = [*words, *LAYOUTS[layout], f"train.run_dir={tmp_path / 'run'}"]
    codes = end_of(start_ranks(2, train_and_die, own, "backward 3", rank))
    assert codes[rank] == -9
    assert codes[1 - rank] not in (None, 0, -9)
    launch(2, train, own)
    assert_bit_equal(whole[layout], tmp_path / "run")


@pytest.mark.parametrize(("layout", "rank"), [("dp2", 0), ("tp2", 1)])
def test_the_launcher_starts_again_and_finishes(
    layout: str, rank: int, words: list[str], whole: dict[str, Path], tmp_path: Path
) -> None:
    variables = {"MAX_RESTARTS": "1", "PET_MAX_RESTARTS": "1", "DOOM": "backward 3", "DOOMED_RANK": str(rank)}
    variables |= {"NNODES": "1", "NODE_RANK": "0", "HEAD": f"127.0.0.1:{free_port()}"}
    with subprocess.Popen(
        [LAUNCH, "tests/faults/cases/doomed.py", *words, *LAYOUTS[layout], f"train.run_dir={tmp_path / 'run'}"],
        env=environment(**variables) | {"RANKS_PER_NODE": "2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            _, said = launcher.communicate(timeout=200)
        finally:
            launcher.terminate()  # not kill, which its ranks would outlive
    assert launcher.returncode == 0, said
    assert re.search(r"exitcode: -9|Signal 9|SIGKILL", said), said
    assert_bit_equal(whole[layout], tmp_path / "run")


def saves(root: Path, step: int, since: float) -> bool:
    """Whether the checkpoint of a step has its name, or a file that is not an earlier attempt's."""
    with suppress(FileNotFoundError):  # what is unfinished may go, or get its name, while it is looked at
        if any(path.stat().st_mtime > since for path in root.glob(f".step_{step:08d}.partial/*")):
            return True
    return step_directory(root, step).exists()


def test_killed_again_and_again_while_it_saves(words: list[str], whole: dict[str, Path], tmp_path: Path) -> None:
    """Four times, either rank, at random moments of the first or second save of a start, beside the training."""
    run_dir, rng = tmp_path / "run", random.Random(4)
    root = run_dir / "checkpoints"
    own = [*words, "parallel.tensor=2", f"train.run_dir={run_dir}"]
    for attempt in range(4):
        begun, newest = time.time(), max(map(step_of, step_directories(root)), default=0)
        step = min(newest + 1 + attempt % 2, STEPS)
        ranks = start_ranks(2, train, own)
        deadline = time.monotonic() + 60
        while not saves(root, step, begun):
            assert all(rank.process.is_alive() for rank in ranks) and time.monotonic() < deadline, attempt
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        victim = ranks[rng.randrange(2)].process
        assert psutil.Process(victim.pid).children() == []
        victim.kill()
        codes = end_of(ranks)
        assert -9 in codes and 0 not in codes and None not in codes
        assert all(find_damage(checkpoint) == [] for checkpoint in step_directories(root))
    launch(2, train, own)
    assert_bit_equal(whole["tp2"], run_dir)
    assert not list(run_dir.glob("checkpoints/.step_*"))


EXPORT = [
    *("os.mkdir .hf.partial", "os.rename 0.safetensors", "open .hf.partial/tokenizer.json"),
    *("open .hf.partial/README.md", "os.rename .hf.partial"),
]


def test_killed_while_it_exports(words: list[str], whole: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole["one"], run_dir)
    shutil.rmtree(run_dir / "hf")
    own = [*words, f"train.run_dir={run_dir}"]
    for doom in EXPORT:
        (code,) = end_of(start_ranks(1, train_and_die, own, doom))
        assert code == -9, doom
        assert not (run_dir / "hf").exists()
    launch(1, train, own)
    assert_bit_equal(whole["one"], run_dir)
    assert not list(run_dir.glob(".hf*"))


BEGINNING = [
    *("open tokens.bin", "open rows.npy", "open store.json", "os.rename .partial", "open .config.yaml"),
    *("os.rename .config.yaml", "os.rename .data.json", "open metrics.jsonl"),
]


def test_killed_while_it_begins(words: list[str], whole: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    own = [*words, f"train.run_dir={run_dir}"]
    for index, doom in enumerate(BEGINNING):
        (code,) = end_of(start_ranks(1, train_and_die, own, doom))
        assert code == -9, doom
        stores = [path for path in (run_dir / "tokens").iterdir() if not path.name.startswith(".")]
        assert len(stores) == (index >= 4), "tokens have their name when they are complete"
    launch(1, train, own)
    assert_bit_equal(whole["one"], run_dir)
