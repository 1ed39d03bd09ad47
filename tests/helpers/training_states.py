"""Checkpoint directories with a description and nothing else, for tests that need one without a training."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megadpo.checkpoint.description import ImportedModel, Progress, RunIdentity, training_json

_IDENTITY = RunIdentity(num_pairs=2, data_digest="", vocab_size=401, reference="", settings={}, versions={})
PROGRESS = Progress(step=1, pairs_consumed=2)


def run_identity(**fields: Any) -> RunIdentity:
    """An identity with these fields, and others that say nothing."""
    return replace(_IDENTITY, **fields)


def trained(directory: Path, *, dtype: str = "bf16", **progress: Any) -> Path:
    """A checkpoint of a run, at a progress with these fields."""
    directory.mkdir(parents=True)
    identity = run_identity(settings={"precision.dtype": dtype})
    (directory / "training.json").write_text(training_json(identity, replace(PROGRESS, **progress)))
    return directory


def imported(directory: Path) -> Path:
    """A checkpoint of converted weights."""
    directory.mkdir(parents=True)
    description = ImportedModel(source="model", dtype="fp32", vocab_size=401, megadpo_version="0")
    (directory / "imported.json").write_text(json.dumps(asdict(description)))
    return directory
