"""A run directory that is in use, a disk that is full, closed or slow, data that have changed, a clock that goes back.

What is told, what stays whole, and that the run can go on afterwards and ends as if nothing had been.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadpo.checkpoint.directory import list_checkpoints
from megadpo.checkpoint.manifest import find_damage
from tests.helpers.jobs.saving import save_on_a_slow_disk
from tests.helpers.jobs.training import train
from tests.helpers.jobs.trouble import (
    ALONE,
    train_on_a_disk_that_rank_0_finds_full,
    train_on_a_slow_disk,
    train_while_the_clock_goes_back,
    train_with_room,
    train_without_end,
)
from tests.helpers.launch import launch, start_ranks
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_bit_equal, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

DAY_S = 86_400.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An undisturbed run, and its words but for the run directory."""
    root = tmp_path_factory.mktemp("whole")
    model = write_tiny_model(root / "model", "llama", num_layers=2)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(10, seed=5))
    words = ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu", "data.workers=1"]
    words += ["precision.dtype=fp32", "trackers=[jsonl]", "optimizer.lr=1e-3", "train.max_steps=4"]
    words += ["train.global_batch_size=4", "train.save_every=1", "checkpoint.keep_last=4", "train.resume=auto"]
    launch(1, train, [*words, f"train.run_dir={root / 'run'}"])
    return root / "run", words


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only the administrator may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def whole_steps(run_dir: Path) -> list[int]:
    """The steps of a run's checkpoints, all of which are whole."""
    found = list_checkpoints(run_dir / "checkpoints")
    assert all(find_damage(checkpoint) == [] for checkpoint in found)
    return [int(checkpoint.name.removeprefix("step_")) for checkpoint in found]


def refusal(function: object, *args: object) -> str:
    """What a launch of one rank is refused with."""
    with pytest.raises(RuntimeError) as caught:
        launch(1, function, *args)  # type: ignore[arg-type]
    last = str(caught.value).split("\nmegadpo.errors.")[-1]
    assert "Traceback" not in last, str(caught.value)
    return last


def test_a_run_directory_belongs_to_one_run(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    words = [*whole[1], f"train.run_dir={tmp_path / 'run'}"]
    (holder,) = start_ranks(1, train_without_end, [*words, "checkpoint.async_save=false"])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():
            assert holder.process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        said = refusal(train, words)
        assert re.search(
            rf"train\.run_dir={re.escape(str(tmp_path / 'run'))}: is in use by process {holder.process.pid} on ", said
        )
        assert "wait for its end, or give another directory" in said
    finally:
        holder.process.kill()
        holder.process.join()
    launch(1, train, words)
    assert_bit_equal(whole[0], tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


def test_too_little_room_is_told_before_anything_is_written(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    words = [*whole[1], f"train.run_dir={tmp_path / 'run'}"]
    said = refusal(train_with_room, words, 1000)
    assert re.search(r"checkpoint .*step_00000001.* takes 0\.00 GiB, its disk has 0\.00 GiB left: make room", said)
    assert whole_steps(tmp_path / "run") == []
    launch(1, train, words)
    assert_bit_equal(whole[0], tmp_path / "run")


@pytest.mark.parametrize("beside", ["true", "false"])
def test_a_disk_that_fills_up_in_a_save(beside: str, whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    words = [*whole[1], f"train.run_dir={tmp_path / 'run'}", f"checkpoint.async_save={beside}"]
    said = refusal(train_with_room, words, None, 50_000)
    assert re.search(r"checkpoint .*step_00000003.* can't be written: rank 0: File too large: make room", said)
    assert "older checkpoints are as they were" in said
    assert whole_steps(tmp_path / "run") == [1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".step_*"))
    launch(1, train, words)
    assert_bit_equal(whole[0], tmp_path / "run")
    assert whole_steps(tmp_path / "run") == [1, 2, 3, 4]


def test_a_real_disk_that_is_full_and_then_closed(whole: tuple[Path, list[str]], small_disk: Path) -> None:
    run_dir = small_disk / "run"
    words = [*whole[1], f"train.run_dir={run_dir}"]
    said = refusal(train_with_room, words)  # that the room is too little is not seen in advance
    assert re.search(r"can't be written: rank 0: No space left on device: make room", said)
    steps = whole_steps(run_dir)
    assert steps and steps[-1] < 4
    said = refusal(train, words)
    assert re.search(r"takes \d+\.\d+ GiB, its disk has \d+\.\d+ GiB left: make room", said)
    assert whole_steps(run_dir) == steps
    remount(small_disk, "ro")
    said = refusal(train, words)
    assert re.search(
        rf"{re.escape(str(run_dir))}/\.lock: can't be written \(Read-only file system\): .*another directory", said
    )
    assert whole_steps(run_dir) == steps
    remount(small_disk, "rw,size=64m")
    launch(1, train, words)
    assert_bit_equal(whole[0], run_dir)


@pytest.mark.parametrize("file", ALONE)
def test_what_rank_0_can_t_write_alone_is_everybody_s_error(
    file: str, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """The other rank waits for it in a collective, and must not wait for good."""
    _, words = whole
    run_dir = tmp_path / "run"
    own = [*words, f"train.run_dir={run_dir}", "parallel.tensor=2"]
    first, second = launch(2, train_on_a_disk_that_rank_0_finds_full, own, file, timeout_s=60.0)
    assert first == second
    assert "can't be written: No space left on device: make room" in first
    assert not list((run_dir / "checkpoints").iterdir())


def test_a_slow_disk_loses_nothing(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    """What is saved is the state of its step, though the training goes on; a second save waits for the first."""
    (waited,) = launch(1, save_on_a_slow_disk, tmp_path / "checkpoints", 0.6)
    assert waited >= 0.6
    words = [*whole[1], f"train.run_dir={tmp_path / 'run'}", "checkpoint.async_save=true"]
    launch(1, train_on_a_slow_disk, words, 0.3)
    assert_bit_equal(whole[0], tmp_path / "run")
    assert whole_steps(tmp_path / "run") == [1, 2, 3, 4]


def test_data_that_have_changed_are_refused(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    rows = make_pairs(10, seed=5)
    rows[3]["chosen"] += " Indeed."
    changed = write_jsonl(tmp_path / "changed.jsonl", rows)
    words = [*whole[1], f"train.run_dir={tmp_path / 'run'}", "train.max_steps=5", f"data.train_path={changed}"]
    assert "the training pairs differ from the checkpoint's (10 now, 10 then, by token ids)" in refusal(train, words)
    assert whole_steps(tmp_path / "run") == [1, 2, 3, 4]


def test_a_clock_that_goes_back_changes_nothing(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    shutil.rmtree(run_dir / "hf")
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    for checkpoint in checkpoints[2:]:
        shutil.rmtree(checkpoint)
    for age, checkpoint in enumerate(checkpoints[:2]):  # by the clock the first is the newest
        os.utime(checkpoint, (time.time() - DAY_S * age,) * 2)
    launch(1, train_while_the_clock_goes_back, [*whole[1], f"train.run_dir={run_dir}"])
    assert_bit_equal(whole[0], run_dir)
    assert whole_steps(run_dir) == [1, 2, 3, 4]
