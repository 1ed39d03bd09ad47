"""Runs that go on from checkpoints that are whole, where a rank can't read one or dies in it, or that are gone."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
from torch.distributed import DistError
from torch.distributed.checkpoint import CheckpointException

from megadpo.checkpoint.manifest import MANIFEST, DamageKind, find_damage
from megadpo.checkpoint.state import readable
from megadpo.errors import CheckpointError
from tests.helpers.jobs import loading as loading_jobs
from tests.helpers.jobs.loading import train_and_die_loading, train_and_hear, train_unable_to_read
from tests.helpers.jobs.training import train
from tests.helpers.launch import launch, start_ranks
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import metrics, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

LAST = "step_00000002"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all runs here have in common, but for the run directory."""
    root = tmp_path_factory.mktemp("reading")
    model = write_tiny_model(root / "model", "llama", num_layers=2)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(10, seed=2))
    common = ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu", "trackers=[jsonl]"]
    common += ["precision.dtype=fp32", "train.global_batch_size=4", "train.max_steps=2", "train.save_every=1"]
    return [*common, "data.validation_fraction=0.2", "parallel.pipeline=2", "train.resume=auto"]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that has come to its end."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    launch(2, train, [*words, f"train.run_dir={run_dir}"])
    return run_dir


@pytest.fixture
def unexported(whole: Path, tmp_path: Path) -> Path:
    """A copy of it as if it had been killed before its export."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "hf")
    return tmp_path / "run"


def test_a_file_that_cannot_be_read_on_one_rank_is_no_damage(words: list[str], unexported: Path) -> None:
    """Its rank is named, and nothing else happens to the checkpoint."""
    own = [*words, f"train.run_dir={unexported}"]
    newest = unexported / "checkpoints" / LAST
    name = by_size(newest)[1]  # which rank 1 reads
    (first, log), (second, _) = launch(2, train_unable_to_read, own, 1, name)
    assert first == second
    assert first.startswith(f"CheckpointError: checkpoint {newest} can't be read now, which does not say that it is")
    said = f"\n  rank 1 ({socket.gethostname()}): {newest}/{name} can't be read now (Input/output error)"
    assert said in first
    assert not [line for line in log if "IS DAMAGED" in line]
    assert {path.name for path in (unexported / "checkpoints").iterdir()} == {"step_00000001", LAST, "latest"}


def by_size(checkpoint: Path) -> list[str]:
    """The files that the manifest tells of, the largest first."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def test_the_card_of_a_run_killed_before_its_export_tells_its_evaluation(words: list[str], unexported: Path) -> None:
    ((refused, log), _) = launch(2, train_and_hear, [*words, f"train.run_dir={unexported}"])
    assert refused == ""
    checked = [line for line in log if line.startswith("checking ")]
    assert len(checked) == 1 and re.fullmatch(rf"checking .*{LAST}, \d+ files of 0\.00 GiB", checked[0])
    evaluated = [line for line in metrics(unexported) if "eval/loss" in line][-1]
    assert evaluated["step"] == 2
    card = (unexported / "hf" / "README.md").read_text()
    assert f"| `loss` |  | {evaluated['eval/loss']:.6g} |" in card


def test_a_finished_run_without_checkpoints_is_not_begun_anew(words: list[str], whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    (first, _), (second, _) = launch(2, train_and_hear, [*words, f"train.run_dir={run_dir}"])
    assert first == second
    assert first.startswith(f"CheckpointError: train.resume=auto: {run_dir}/hf is there, the model of a run that has ")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_death_in_a_load_does_not_blame_the_checkpoint(words: list[str], unexported: Path) -> None:
    survivor, _ = start_ranks(2, train_and_die_loading, [*words, f"train.run_dir={unexported}"], 1)
    assert survivor.outcome.poll(60)
    finished, said = survivor.outcome.recv()
    assert not finished
    assert "CheckpointError" not in said
    assert "torch/distributed/distributed_c10d.py" in said
    survivor.process.join(10)


def test_sizes_decide_before_contents_are_read(unexported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = unexported / "checkpoints" / LAST
    read: list[str] = []
    digest_of = loading_jobs.digest_of
    monkeypatch.setattr("megadpo.checkpoint.manifest.digest_of", lambda path: read.append(path.name) or digest_of(path))
    size = (checkpoint / "hf" / "config.json").stat().st_size
    (checkpoint / "hf" / "config.json").write_text("{}")
    changed = (DamageKind.side_file, f"hf/config.json has 2 bytes, {size} were written")
    lost = (DamageKind.content, "training.json is missing")
    assert [(found.kind, found.text) for found in find_damage(checkpoint, free="hf")] == [changed]
    assert len(read) == len(by_size(checkpoint)) - 1, "what may be changed decides nothing"
    read.clear()
    (checkpoint / "training.json").unlink()
    assert [(found.kind, found.text) for found in find_damage(checkpoint, free="hf")] == [changed, lost]
    assert read == []


@pytest.mark.parametrize("call", ["read_text", "stat"])
def test_what_cannot_be_looked_at_is_no_damage(call: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = vars(Path)[call]

    def stale(path: Path, **options: Any) -> Any:
        if path.name in (MANIFEST, "__0_0.distcp"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return original(path, **options)

    monkeypatch.setattr(Path, call, stale)
    with pytest.raises(OSError, match="Stale file handle"):
        find_damage(whole / "checkpoints" / LAST)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_collectives_raise_passes_unchanged(wrapped: bool, tmp_path: Path) -> None:
    """Also where torch tells it as a failure of its own."""
    lost: BaseException = DistError("Connection closed by peer")
    if wrapped:
        lost = CheckpointException("read", {0: (lost, StackSummary())})
    with pytest.raises(type(lost)) as seen, readable(tmp_path, "train.resume=DIR"):
        raise lost
    assert seen.value is lost
    with pytest.raises(CheckpointError, match="can't be loaded"), readable(tmp_path, "train.resume=DIR"):
        raise RuntimeError("a torn archive")
