"""Log-probs of fixed weights and tokens are what they were: kept ones are taken for those of today's program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megadpo.reference.key import NUMERICS_VERSION
from megadpo.reference.store import _RECORD
from tests.helpers.jobs.fault import Start, start_each
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model

# version: precision: sums over three pairs of the chosen, the rejected, and their tails' log-probs
KNOWN = {
    1: {
        "fp32": [-996.24146, -924.28397, -107.77290, -29.87052],
        "bf16": [-996.22346, -924.39265, -107.79034, -29.86599],
        "mxfp8": [-996.26440, -923.70186, -107.69208, -29.75216],
    }
}
PRECISIONS = {
    "fp32": ["precision.dtype=fp32"],
    "bf16": ["precision.dtype=bf16"],
    "mxfp8": ["precision.dtype=bf16", "precision.fp8=mxfp8", "precision.fp8_backend=emulate"],
}


def write_fixed_model(directory: Path) -> Path:
    """A model whose weights are drawn by numpy, which promises the same numbers for ever."""
    write_tiny_model(directory, "llama", num_layers=2)
    path = directory / "model.safetensors"
    weights, draw = load_file(path), np.random.Generator(np.random.PCG64(0))
    for name in sorted(weights):
        noise = 0.08 * draw.standard_normal(tuple(weights[name].shape), dtype=np.float32)
        weights[name].copy_(weights[name].new_tensor(noise + ("norm" in name)))
    save_file(weights, path, metadata={"format": "pt"})
    return directory


def test_log_probs_are_those_of_the_version(tmp_path: Path) -> None:
    words = [
        "+model=hf",
        f"model.hf_path={write_fixed_model(tmp_path / 'model')}",
        f"data.train_path={write_jsonl(tmp_path / 'pairs.jsonl', make_pairs(3, seed=1))}",
        *("device.kind=cpu", "trackers=[jsonl]", "data.tokens_per_microbatch=704", "train.global_batch_size=3"),
        *("reference.mode=cached", "train.max_steps=1", "data.template_date=2026-01-01"),
    ]
    starts = [
        Start(name, [*words, *own, f"train.run_dir={tmp_path / name}"], tmp_path / name)
        for name, own in PRECISIONS.items()
    ]
    (outcomes,) = launch(1, start_each, starts)
    assert {outcome.text for outcome in outcomes.values()} == {""}
    found = {}
    for name in PRECISIONS:
        (segment,) = (tmp_path / name / "reference").glob("*/*.logps")
        found[name] = np.fromfile(segment, _RECORD)["logps"].sum(axis=0).tolist()
    known = KNOWN.get(NUMERICS_VERSION, {})
    for name, tolerance in {"fp32": 1e-5, "bf16": 5e-4, "mxfp8": 2e-3}.items():
        assert found[name] == pytest.approx(known.get(name), rel=tolerance), (
            f"other numbers than version {NUMERICS_VERSION} gave: caches that users have would be wrong. If that is "
            f"meant, raise NUMERICS_VERSION in megadpo/reference/key.py and write here what it gives: {found}"
        )
