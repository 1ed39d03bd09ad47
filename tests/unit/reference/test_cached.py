"""References without a model, kept numbers and none at all, answer on the last stage only."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megadpo.reference import CachedReference, NoReference

CPU = torch.device("cpu")


def test_kept_and_missing_numbers_answer_on_the_last_stage_only() -> None:
    batch: Any = SimpleNamespace(
        microbatches=[
            SimpleNamespace(num_pairs=2),
            SimpleNamespace(pair_digests=(), num_pairs=0),
        ]
    )
    digests = [b"b\0".ljust(16), b"a\0".ljust(16), b"c" * 16]
    kept = digests, np.array([(-2.0, -math.e, 0.0, -0.25), (-math.pi, -1.0, -0.5, 0.0), (-3.0,) * 4])
    batch.microbatches[0].pair_digests = tuple(digests[:2])
    cached = CachedReference(*kept, is_last_stage=True, torch_device=CPU)
    first, empty = cached.log_probs(batch)
    assert torch.equal(first.columns(), torch.tensor(kept[1][:2])) and cached.kept(digests).tolist() == kept[1].tolist()
    for unknown in (b"0" * 16, b"bb" * 8, b"d" * 16):
        with pytest.raises(KeyError):
            cached.kept([digests[0], unknown])
    assert first.chosen_B.tolist() == [-2.0, -math.pi] and first.rejected_B.tolist() == [-math.e, -1.0]
    assert first.chosen_tail_B.tolist() == [0.0, -0.5] and first.rejected_tail_B.tolist() == [-0.25, 0.0]
    assert first.chosen_B.dtype is torch.float64 and empty.chosen_B.shape == (0,)
    nothing = NoReference(is_last_stage=True, torch_device=CPU).log_probs(batch)
    assert [scores.chosen_B.tolist() for scores in nothing] == [[0.0, 0.0], []]
    for reference in (
        CachedReference(*kept, is_last_stage=False, torch_device=CPU),
        NoReference(is_last_stage=False, torch_device=CPU),
    ):
        assert reference.log_probs(batch) == [] and reference.device_bytes() == 0
