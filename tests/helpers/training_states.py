"""What a checkpoint says about a run, for tests that need one without a training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megadpo.checkpoint.directory import TrainingState

_STATE = TrainingState(
    step=1,
    pairs_consumed=2,
    num_pairs=2,
    data_digest="",
    vocab_size=401,
    reference="",
    settings={},
    metrics={},
    skipped=0,
    versions={},
)


def training_state(**fields: Any) -> TrainingState:
    """A state with these fields, and others that say nothing."""
    return replace(_STATE, **fields)
