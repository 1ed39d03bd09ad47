"""Saves that take long, on disks that are slow or do not answer, and what does not have to wait for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megadpo.checkpoint.directory import list_checkpoints
from megadpo.checkpoint.manifest import find_damage
from megadpo.health.watchdog import STUCK
from megadpo.runtime.device import host_copy
from tests.helpers.jobs.slow_disk import (
    collects_garbage_while_writing,
    end_beside_a_removal_without_end,
    save_beside_a_slow_removal,
    save_without_memory,
    seconds_to_close,
    train_while_rank_1_does_not_write,
    train_while_rank_1_writes_slowly,
)
from tests.helpers.launch import launch, start_ranks
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model

# Who stands still for so long is ended 4 seconds later: a slow save takes longer than both.
TIMEOUT_S = 4.0
WRITING_S = 10.0


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("slow")
    model = write_tiny_model(root / "model", "llama", num_layers=2)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(8, seed=5))
    common = ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu", "data.workers=1"]
    common += ["precision.dtype=fp32", "trackers=[jsonl]", "train.global_batch_size=4", "train.save_every=1"]
    return [*common, f"parallel.timeout_s={TIMEOUT_S}"]


def test_a_save_that_gets_on_is_not_ended_however_long_it_takes(words: list[str], tmp_path: Path) -> None:
    """One that is waited for; and one beside the training, waited for by the next save and at the end of the run."""

    def train(name: str, steps: int) -> list[tuple[list[str], list[str]]]:
        own = [f"train.run_dir={tmp_path / name}", f"train.max_steps={steps}", f"checkpoint.async_save={name}"]
        return launch(2, train_while_rank_1_writes_slowly, [*words, *own], WRITING_S)

    with ThreadPoolExecutor(2) as pool:
        waited, beside = pool.submit(train, "false", 1), pool.submit(train, "true", 2)
    for name, steps, runs in (("false", 1, waited.result()), ("true", 2, beside.result())):
        found = list_checkpoints(tmp_path / name / "checkpoints")
        assert len(found) == steps and all(find_damage(checkpoint) == [] for checkpoint in found)
        for rank, doing in enumerate(("waiting for others to write their parts of the checkpoint", "writing its chec")):
            for step in range(1, steps + 1):
                assert sum(place.startswith(f"{step} {doing}") for place in runs[rank][0]) >= 4
    told = [line for line in beside.result()[0][1] if line.startswith("waited ")]
    assert len(told) == 1 and " s for the checkpoint of step 1 to be written, which took " in told[0]
    assert told[0].endswith("raise train.save_every, or choose a faster disk")
    assert not [line for line in waited.result()[0][1] if line.startswith("waited ")]


def test_whatever_ranks_wait_for_each_other_in_is_a_place(words: list[str], tmp_path: Path) -> None:
    own = [f"train.run_dir={tmp_path / 'run'}", "train.max_steps=1", "checkpoint.async_save=true"]
    own += ["precision.fp8=tensorwise", "precision.fp8_backend=emulate", "precision.fp8_check_every=1"]
    for places, _ in launch(2, train_while_rank_1_writes_slowly, [*words, *own], 0.0):
        assert list(dict.fromkeys(place for place in places if "GiB" not in place)) == [
            "0 opening trackers",
            "0 comparing weights",
            "0 checking FP8",
            "1 waiting for its batch",
            "1 update",
            "1 logging",
            "1 checking FP8",
            "1 saving",
            "1 naming the checkpoint",
            "1 closing trackers",
        ]


def test_a_save_that_does_not_get_on_is_ended_and_named(words: list[str], tmp_path: Path) -> None:
    own = [f"train.run_dir={tmp_path / 'run'}", "train.max_steps=2"]
    ranks = start_ranks(2, train_while_rank_1_does_not_write, [*words, *own], tmp_path / "log")
    try:
        assert ranks[0].exit_code(60.0) == STUCK
        assert ranks[1].exit_code(60.0) in (STUCK, 1)  # it may see that rank 0 is gone before it ends by itself
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
    log = (tmp_path / "log").read_text()
    assert "rank 0 at step 1, waiting for others to write their parts of the checkpoint, 0.0 of 0.0 GiB (" in log
    assert "rank 1 at step 1, writing its checkpoint, 0.0 of 0.0 GiB (" in log


def test_nobody_waits_for_old_checkpoints_to_be_removed_but_the_next_save(tmp_path: Path) -> None:
    ((names, begun, waited),) = launch(1, save_beside_a_slow_removal, tmp_path / "checkpoints")
    assert names == [".step_00000001.removed", "latest", "step_00000002", "step_00000003"]
    assert begun == [0] * 5
    assert waited[0].startswith("4 waiting for old checkpoints to be removed, ")


def test_a_run_does_not_end_over_old_checkpoints_nor_wait_for_them_for_ever(tmp_path: Path) -> None:
    (log,) = launch(1, end_beside_a_removal_without_end, tmp_path / "checkpoints")
    told = [line for line in log if "removed" in line]
    assert len(told) == 2
    assert "step_00000001 can't be removed yet (Device or resource busy): the next save tries again" in told[0]
    assert "files of old checkpoints are not removed yet" in told[1]


def test_a_write_that_does_not_end_does_not_hide_an_error(tmp_path: Path) -> None:
    (seconds,) = launch(1, seconds_to_close, tmp_path / "checkpoints")
    assert seconds < 20


def test_garbage_is_collected_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    assert launch(1, collects_garbage_while_writing, tmp_path / "checkpoints") == [{True}]


def test_a_rank_without_memory_for_copies_is_everybody_s_error(tmp_path: Path) -> None:
    first, second = launch(2, save_without_memory, tmp_path / "checkpoints")
    assert first == second
    assert first.startswith(
        "checkpoint.async_save=true: needs a copy of all that is saved in the host's memory, rank 1"
    )
    assert "(CUDA error: out of memory): set checkpoint.async_save=false" in first
    assert not list((tmp_path / "checkpoints").iterdir())


def test_memory_that_can_t_be_had_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    tensor = torch.zeros(2)
    monkeypatch.setattr(torch, "empty_like", refuse)
    with pytest.raises(MemoryError, match=r"^CUDA error: out of memory$"):
        host_copy(tensor)
