"""The description of a run's checkpoint, for tests that need one without a training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megadpo.checkpoint.description import Progress, RunIdentity

_IDENTITY = RunIdentity(num_pairs=2, data_digest="", vocab_size=401, reference="", settings={}, versions={})
PROGRESS = Progress(step=1, pairs_consumed=2)


def run_identity(**fields: Any) -> RunIdentity:
    """An identity with these fields, and others that say nothing."""
    return replace(_IDENTITY, **fields)
