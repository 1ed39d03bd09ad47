"""What a run began with stays when it goes on: the date that templates are told, the checkpoint it started from."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from megadpo.checkpoint.description import Progress, training_json
from megadpo.checkpoint.directory import step_directory
from megadpo.config.compose import compose_config, resolve_defaults
from megadpo.config.schema import Config
from megadpo.setup.model_source import resolve_model
from megadpo.setup.run_directory import restore_starting_choices
from tests.helpers.training_states import run_identity


def configure(*words: str) -> Config:
    return compose_config(["+model=hf", "model.hf_path=x", "data.train_path=x", *words])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was started on 2024-07-26 from step 2 of another one, which has gone on to step 3."""
    for step in (2, 3):
        checkpoint(tmp_path / "other", step, {})
    settings = {"data.template_date": "2024-07-26", "model.checkpoint": str(step_directory(tmp_path / "other", 2))}
    checkpoint(tmp_path / "run" / "checkpoints", 2, settings)
    return tmp_path / "run"


def checkpoint(root: Path, step: int, settings: dict[str, str]) -> None:
    directory = step_directory(root, step)
    directory.mkdir(parents=True)
    identity = run_identity(settings=settings)
    (directory / "training.json").write_text(training_json(identity, Progress(step=step)))


def date_of(config: Config) -> str | None:
    return resolve_defaults(restore_starting_choices(config), datetime(2030, 1, 1)).data.template_date


def test_a_fresh_run_takes_the_day_it_starts(run_dir: Path) -> None:
    assert date_of(configure()) == "2030-01-01"
    assert date_of(configure("train.resume=auto", f"train.run_dir={run_dir.parent / 'other'}")) == "2030-01-01"


def test_a_resumed_run_keeps_its_first_day(run_dir: Path) -> None:
    assert date_of(configure("train.resume=auto", f"train.run_dir={run_dir}")) == "2024-07-26"
    assert date_of(configure(f"train.resume={run_dir}")) == "2024-07-26"


def test_a_date_that_is_given_wins(run_dir: Path) -> None:
    words = ("train.resume=auto", f"train.run_dir={run_dir}", "data.template_date=1999-12-31")
    assert date_of(configure(*words)) == "1999-12-31"


def started_from(*words: str) -> str:
    words = ("model.hf_path=null", *words)
    return Path(str(resolve_model(restore_starting_choices(configure(*words))).model.checkpoint)).name


def test_a_resumed_run_keeps_the_checkpoint_it_started_from(run_dir: Path) -> None:
    other, resume = run_dir.parent / "other", ("train.resume=auto", f"train.run_dir={run_dir}")
    assert started_from(f"model.checkpoint={other}") == "step_00000003"
    assert started_from(f"model.checkpoint={other}", *resume) == "step_00000002"
    assert started_from(f"model.checkpoint={other / 'step_00000002'}", *resume) == "step_00000002"
    assert started_from(f"model.checkpoint={other / 'step_00000003'}", *resume) == "step_00000003"
