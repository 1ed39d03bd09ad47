"""The date that chat templates are told stays that of the run's first start."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from megadpo.config.compose import compose_config, resolve_defaults
from megadpo.config.schema import Config
from megadpo.resume import keep_template_date


def configure(*words: str) -> Config:
    return compose_config(["+model=hf", "model.hf_path=x", "data.train_path=x", *words])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was started on 2024-07-26 and has a checkpoint."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    settings = {"data.template_date": "2024-07-26"}
    state = {"step": 2, "num_pairs": 1, "data_digest": "", "settings": settings}
    (checkpoint / "training.json").write_text(json.dumps(state))
    return tmp_path / "run"


def date_of(config: Config) -> str | None:
    return resolve_defaults(keep_template_date(config), datetime(2030, 1, 1)).data.template_date


def test_a_fresh_run_takes_the_day_it_starts(run_dir: Path) -> None:
    assert date_of(configure()) == "2030-01-01"
    assert date_of(configure("train.resume=auto", f"train.run_dir={run_dir.parent / 'other'}")) == "2030-01-01"


def test_a_resumed_run_keeps_its_first_day(run_dir: Path) -> None:
    assert date_of(configure("train.resume=auto", f"train.run_dir={run_dir}")) == "2024-07-26"
    assert date_of(configure(f"train.resume={run_dir}")) == "2024-07-26"


def test_a_date_that_is_given_wins(run_dir: Path) -> None:
    words = ("train.resume=auto", f"train.run_dir={run_dir}", "data.template_date=1999-12-31")
    assert date_of(configure(*words)) == "1999-12-31"
