"""What a continuation may change of its run only where it says so: pairs, batch size, loss, reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megadpo.checkpoint.description import read_training
from megadpo.checkpoint.directory import list_checkpoints
from tests.helpers.jobs.fault import Outcome, Start, start_each
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

# Name: the words that change something, the change that is meant, and what is said of it.
CHANGES = {
    "batch": (
        ["train.global_batch_size=3"],
        "batch_size",
        "train.global_batch_size=3: the checkpoint was written with 4",
    ),
    "loss": (["loss.beta=0.2"], "loss", "loss.beta=0.2: the checkpoint was written with 0.1"),
    "data": (["data.train_path=OTHER"], "data", "the training pairs differ from the checkpoint's (9 now, 10 then"),
    "reference": (["reference.hf_path=MODEL2"], "reference", "the reference's weights differ from the run's"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """A run of two steps; then each change on a copy of it, refused and meant, and some that are free."""
    root = tmp_path_factory.mktemp("changes")
    model = write_tiny_model(root / "model", "llama", num_layers=1)
    write_tiny_model(root / "model2", "llama", num_layers=1, seed=1)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(10, seed=5))
    write_jsonl(root / "other.jsonl", make_pairs(9, seed=6))
    common = ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu", "trackers=jsonl"]
    common += ["precision.dtype=fp32", "train.global_batch_size=4", "data.workers=1", "train.save_every=1"]
    starts = [Start("run", [*common, f"train.run_dir={root / 'run'}", "train.max_steps=2"], root / "run")]

    def resume(name: str, *words: str) -> None:
        own = [
            word.replace("OTHER", str(root / "other.jsonl")).replace("MODEL2", str(root / "model2")) for word in words
        ]
        run_dir = root / name
        starts.append(Start(name, [*common, f"train.run_dir={run_dir}", "train.resume=auto", *own], run_dir))

    for name, (words, change, _) in CHANGES.items():
        resume(f"{name}_refused", *words)
        resume(f"{name}_meant", *words, f"train.resume_changes={change}")
    resume("free", "optimizer.lr=2e-6", "train.max_hours=10", "train.max_bad_steps=7")
    (first,) = launch(1, start_and_copy, starts)
    return root, first


def start_and_copy(starts: list[Start]) -> dict[str, Outcome]:
    """`start_each`, in which all but the first go on from copies of the first's run directory."""
    first, *others = starts
    outcomes = start_each([first])
    for start in others:
        shutil.copytree(first.run_dir, start.run_dir)
    return outcomes | start_each(others)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_unless_it_is_meant(name: str, outcomes: tuple[Path, dict[str, Outcome]]) -> None:
    _, of = outcomes
    _, change, said = CHANGES[name]
    refused = of[f"{name}_refused"]
    assert refused.refused
    assert said in refused.text
    assert f"or say that it is meant with train.resume_changes=[{change}]" in refused.text
    meant = of[f"{name}_meant"]
    assert (meant.refused, meant.text) == (False, "")
    assert f"resuming with {said}" in meant.log
    assert "as train.resume_changes says" in meant.log


def test_a_run_of_another_batch_size_goes_on_behind_the_last_pair(outcomes: tuple[Path, dict[str, Outcome]]) -> None:
    """Eight of ten pairs are taken: the two that are left make one step of at most three."""
    root, _ = outcomes
    lines = training_lines(root / "batch_meant")
    assert [(line["step"], line["pairs"], line["epoch"]) for line in lines] == [(1, 4, 0.4), (2, 4, 0.8), (3, 2, 1.0)]
    _, progress = read_training(list_checkpoints(root / "batch_meant" / "checkpoints")[-1])
    assert (progress.step, progress.pairs_consumed) == (3, 10)


def test_other_pairs_begin_with_their_first_epoch(outcomes: tuple[Path, dict[str, Outcome]]) -> None:
    root, _ = outcomes
    lines = training_lines(root / "data_meant")
    assert [(line["step"], line["pairs"], line["epoch"]) for line in lines[2:]] == [
        (3, 4, pytest.approx(4 / 9)),
        (4, 4, pytest.approx(8 / 9)),
        (5, 1, 1.0),
    ]


def test_other_settings_are_named_or_free(outcomes: tuple[Path, dict[str, Outcome]]) -> None:
    _, of = outcomes
    assert not of["free"].refused
    assert "resuming with optimizer.lr=2e-06; the checkpoint was written with 1e-06" in of["free"].log
    assert "max_hours" not in of["free"].log and "max_bad_steps" not in of["free"].log
