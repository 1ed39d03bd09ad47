"""Checkpoints that came to harm on disk: found before a weight is used, and what a run and the tools make of them.

All starts are one launch of two ranks, which read the files in halves.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.faults.cases.damage import DAMAGES, Damage
from tests.helpers.jobs.fault import MeetingPlaces, Outcome, Start, export_each, start_each
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import exported_weights, metrics, numbers, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {damage.name: damage for damage in DAMAGES}
# These stand for the others: that each is found is what the refusals show, and what is done then is the same.
FALLS_BACK = (
    *("flipped bit of rank 1", "truncated", "missing shard", "shard of another save", "missing metadata"),
    *("missing description", "missing manifest"),
)
# Whole ones, of which this version knows that it can't read them.
OTHER_VERSIONS = ("description of another version", "manifest of another format")
CHANGED = "other config.json"
# Damages that tools meet that only take the weights of a checkpoint.
OF_WEIGHTS = ("flipped bit of rank 1", "missing shard", "missing manifest", "manifest of another format")
LAST, BEFORE = "step_00000003", "step_00000002"


@dataclass(frozen=True)
class Table:
    """The undisturbed run's directory beside those of the cases, and how each start ended on both ranks."""

    root: Path
    outcomes: list[dict[str, Outcome]]

    def both(self, name: str) -> tuple[Outcome, Outcome]:
        """The outcomes of a start."""
        first, second = (outcomes[name] for outcomes in self.outcomes)
        return first, second


def slug(name: str) -> str:
    return re.sub(r"\W", "_", name)


def killed_before_its_export(whole: Path, copy: Path, damage: Damage | None, *, only_one: bool = False) -> Path:
    """A copy of a run that was killed at its end, with its newest checkpoint damaged."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "hf")
    checkpoints = copy / "checkpoints"
    if damage is not None:
        damage.make(checkpoints / LAST, checkpoints / BEFORE)
    if only_one:
        shutil.rmtree(checkpoints / BEFORE)
    return copy


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    root = tmp_path_factory.mktemp("damaged")
    model = write_tiny_model(root / "model", "llama", num_layers=2)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(8, seed=2))
    common = ["+model=hf", f"data.train_path={data}", "device.kind=cpu", "precision.dtype=fp32", "trackers=[jsonl]"]
    common += ["train.global_batch_size=4", "train.max_steps=3", "train.save_every=1", "optimizer.lr=1e-3"]
    common += ["checkpoint.keep_last=2", "parallel.pipeline=2"]
    own = f"model.hf_path={model}"

    def start(name: str, run_dir: Path, *words: str) -> Start:
        return Start(name, [*common, f"train.run_dir={run_dir}", *words], run_dir)

    whole = root / "whole"
    launch(2, start_each, [start("whole", whole, own)])
    starts = []
    for name, damage in BY_NAME.items():
        if name in (*FALLS_BACK, *OTHER_VERSIONS):
            copy = killed_before_its_export(whole, root / slug(name), damage)
            starts.append(start(name, copy, own, "train.resume=auto"))
        alone = killed_before_its_export(whole, root / f"alone_{slug(name)}", damage, only_one=True)
        starts.append(start(f"alone: {name}", alone, own, "train.resume=auto"))
    for name in OF_WEIGHTS:
        named = root / f"alone_{slug(name)}" / "checkpoints" / LAST
        starts.append(start(f"named: {name}", named.parents[1], own, f"train.resume={named}"))
        starts.append(start(f"weights: {name}", root / f"from_{slug(name)}", f"model.checkpoint={named}"))
    copy = killed_before_its_export(whole, root / "no_latest", None)
    (copy / "checkpoints" / "latest").unlink()
    starts.append(start("no latest", copy, own, "train.resume=auto"))
    exports = {name: root / f"alone_{slug(name)}" / "checkpoints" / LAST for name in OF_WEIGHTS}
    return Table(root, launch(2, start_and_export, starts, exports, root / "exports"))


def start_and_export(starts: list[Start], exports: dict[str, Path], out: Path) -> dict[str, Outcome]:
    """`start_each`, and then the checkpoints' exports by the conversion tool, as `export: NAME`."""
    places = MeetingPlaces()
    return start_each(starts, places) | export_each(exports, out, places)


@pytest.mark.parametrize("name", FALLS_BACK)
def test_the_run_falls_back_and_ends_as_if_nothing_had_been(table: Table, name: str) -> None:
    run_dir, whole = table.root / slug(name), table.root / "whole"
    outcome = table.both(name)[0]
    assert (outcome.refused, outcome.text) == (False, "")
    said = rf"{LAST} IS DAMAGED and is not used; it is now damaged_{LAST}:\n.*{BY_NAME[name].says}"
    assert re.search(said, outcome.log), outcome.log
    assert f"the run goes on from {run_dir / 'checkpoints' / BEFORE}" in outcome.log
    before, after = exported_weights(whole), exported_weights(run_dir)
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    assert numbers(run_dir) == numbers(whole)
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {BEFORE, LAST, f"damaged_{LAST}", "latest"}
    assert (run_dir / "checkpoints" / "latest").read_text() == f"{LAST}\n"


@pytest.mark.parametrize("name", OTHER_VERSIONS)
def test_a_checkpoint_of_another_version_is_not_passed_over(table: Table, name: str) -> None:
    """Going on from the one before would train its steps once more."""
    for start, run_dir in ((name, slug(name)), (f"alone: {name}", f"alone_{slug(name)}")):
        first, second = table.both(start)
        assert first.refused and first.text == second.text
        newest = table.root / run_dir / "checkpoints" / LAST
        said = rf"train\.resume=auto: {newest} is of another version of megadpo: .*{BY_NAME[name].says}"
        assert re.match(said, first.text, re.DOTALL), first.text
        assert newest.is_dir()


def test_a_side_file_that_was_changed_is_said_and_used(table: Table) -> None:
    """It may have been changed on purpose; what a run goes on with is not among them."""
    first, _ = table.both(f"alone: {CHANGED}")
    assert (first.refused, first.text) == (False, "")
    said = rf"{LAST} was changed since it was written, and is used as it is:.*{BY_NAME[CHANGED].says}"
    assert re.search(said, first.log, re.DOTALL)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in (*OTHER_VERSIONS, CHANGED)])
def test_without_another_checkpoint_the_run_is_refused(table: Table, name: str) -> None:
    first, second = table.both(f"alone: {name}")
    assert first.refused and second.refused, first.text
    assert first.text == second.text
    run_dir = table.root / f"alone_{slug(name)}"
    said = rf"train\.resume=auto: no checkpoint of {run_dir} is whole; bring one back, .*{LAST}: .*{BY_NAME[name].says}"
    assert re.match(said, first.text, re.DOTALL), first.text
    assert first.weight_reads == 0
    assert first.written <= {".lock"}
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {LAST, "latest"}


@pytest.mark.parametrize("what", ["named", "weights", "export"])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_who_names_it_is_refused(table: Table, name: str, what: str) -> None:
    first, second = table.both(f"{what}: {name}")
    assert first.refused and second.refused, first.text
    assert first.text == second.text
    key = "train.resume=DIR" if what == "named" else "model.checkpoint=DIR"
    checkpoint = table.root / f"alone_{slug(name)}" / "checkpoints" / LAST
    said = rf"checkpoint {re.escape(str(checkpoint))} is damaged, name another one with {key}.*{BY_NAME[name].says}"
    assert re.match(said, first.text, re.DOTALL), first.text
    assert first.weight_reads == 0
    assert not (table.root / "exports" / slug(name)).exists()


def test_a_lost_latest_is_made_again(table: Table) -> None:
    run_dir = table.root / "no_latest"
    assert table.both("no latest")[0].text == ""
    assert (run_dir / "checkpoints" / "latest").read_text() == f"{LAST}\n"
    assert len(metrics(run_dir)) == len(metrics(table.root / "whole"))
    before, after = exported_weights(table.root / "whole"), exported_weights(run_dir)
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
