"""A bit that flips on one rank stops the run: rank and weight are named on all ranks, and it is never saved."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import megadpo
from megadpo.setup.program import described_program
from tests.helpers.jobs.bad import Fault, Seen, start_with_another_program, train_with_faults
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model

OVERLAPS = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("replicas")
    model = write_tiny_model(root / "model", "qwen2", tied=True, num_layers=4, hidden=40, heads=2, kv_heads=2)
    return [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={write_jsonl(root / 'pairs.jsonl', make_pairs(8, seed=5))}",
        "data.tokens_per_microbatch=400",
        "device.kind=cpu",
        "trackers=[jsonl]",
        "train.max_steps=4",
        "train.global_batch_size=4",
        "train.save_every=1",
        "optimizer.lr=1e-3",
    ]


# Layout: ranks, words, the fault of step 3, who is named with what.
CASES = {
    # A weight in place: found in the step itself, by the owner of its part too.
    "dp2": (
        ["precision.dtype=bf16", "train.check_ranks_every=3"],
        Fault(1, "bit", "layers.2.mlp.linear_fc1.weight"),
        r"step 3: .*rank 1 \(tensor 0, pipeline 0, data 1, on .*\): decoder\.layers\.2\.mlp\.linear_fc1\.weight, "
        r"unlike rank 0$",
    ),
    # Between backward and update, where gathering is overlapped: any other time it is healed before it is used.
    "dp2_overlaps": (
        ["precision.dtype=fp32", "train.check_ranks_every=1", *OVERLAPS],
        Fault(1, "bit", "final_layernorm.weight", late=True),
        r"step 3: .*rank 1 .*: decoder\.final_layernorm\.weight, unlike rank 0$",
    ),
    # Not checked in the step: found before the save behind it, as nothing heals what tensor ranks hold apart.
    "tp2": (
        ["precision.dtype=fp32", "parallel.tensor=2"],
        Fault(1, "bit", "layers.1.pre_mlp_layernorm.weight"),
        r"step 3: .*rank 1 \(tensor 1, .*\): decoder\.layers\.1\.pre_mlp_layernorm\.weight, unlike rank 0$",
    ),
    "pp2": (
        ["precision.dtype=fp32", "parallel.pipeline=2"],
        Fault(1, "bit", "output_layer.weight"),
        r"step 3: .*rank 1 \(tensor 0, pipeline 1, .*\): the tied embedding, unlike rank 0$",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_flipped_bit_is_found(name: str, words: list[str], tmp_path: Path) -> None:
    layout, fault, said = CASES[name]
    seen: list[Seen] = launch(2, train_with_faults, [*words, *layout, f"train.run_dir={tmp_path}"], {3: [fault]})
    for rank in seen:
        assert re.fullmatch(f"TrainingError: {said}", rank.error, re.DOTALL), rank.error
        assert list(rank.skipped.values()) == [()] * len(rank.skipped)
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert "step_00000003" not in saved and "step_00000001" in saved
    assert not (tmp_path / "hf").exists()


def test_a_weight_that_is_not_finite_is_named_at_the_first_bad_step(words: list[str], tmp_path: Path) -> None:
    """It would make every step a bad one, and a checkpoint of it would be lost."""
    layout = ["parallel.pipeline=2", "precision.dtype=bf16", f"train.run_dir={tmp_path}"]
    seen: list[Seen] = launch(
        2, train_with_faults, [*words, *layout], {2: [Fault(1, "nan", "layers.1.mlp.linear_fc2.weight")]}
    )
    for rank in seen:
        assert "step 2: weights are NaN or infinite" in rank.error
        assert rank.error.endswith("rank 1: decoder.layers.3.mlp.linear_fc2.weight")
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]


def test_another_program_is_refused_at_the_start(words: list[str], tmp_path: Path) -> None:
    said = launch(2, start_with_another_program, [*words, f"train.run_dir={tmp_path / 'run'}"])
    assert said[0] == said[1]
    assert said[0].startswith("ranks [1] see another program (megadpo's files, or versions of what it stands on) than")
    assert not (tmp_path / "run").exists()


def test_a_program_is_described_by_its_files_and_versions(tmp_path: Path) -> None:
    described = described_program()
    assert described == described_program()
    assert f"torch {torch.__version__}" in described and re.search(r"files [0-9a-f]{16}$", described)
    copy = shutil.copytree(Path(megadpo.__file__).parent, tmp_path / "megadpo")
    assert described_program(copy) == described, "all of the package's files are described, wherever it is installed"
    changed = copy / "train" / "train_step.py"
    changed.write_bytes(changed.read_bytes() + b"\n")
    other = described_program(copy)
    assert other != described
    changed.rename(changed.with_name("renamed.py"))
    assert described_program(copy) not in (described, other)
