"""The exported directory is the trained policy: transformers scores it as the run's own evaluation did."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.jobs.conversion import score_pairs
from tests.helpers.jobs.training import export_with_ranks_apart, train
from tests.helpers.launch import launch
from tests.helpers.naive import load_hf, pair_logps
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import metrics, write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.tokenized import tokenized_pairs

BETA = 0.3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, validation file, run directory) of a tp2·pp2 run with two validation sets of other sizes than a batch."""
    root = tmp_path_factory.mktemp("export")
    model = write_tiny_model(root / "model", "qwen3")
    train_file = write_jsonl(root / "train.jsonl", make_pairs(12, seed=1))
    validation = write_jsonl(root / "validation.jsonl", make_pairs(7, seed=2))
    again = write_jsonl(root / "again.jsonl", make_pairs(5, seed=3))
    launch(
        4,
        train,
        [
            "+model=hf",
            f"model.hf_path={model}",
            f"data.train_path={train_file}",
            f"data.validation_path={{held_out: {validation}, again: {again}}}",
            "data.tokens_per_microbatch=128",
            "parallel.tensor=2",
            "parallel.pipeline=2",
            "precision.dtype=fp32",
            "device.kind=cpu",
            f"loss.beta={BETA}",
            "train.max_steps=4",
            "train.global_batch_size=4",
            "train.eval_every=2",
            "train.log_every=2",
            "optimizer.lr=1e-4",
            f"train.run_dir={root / 'run'}",
        ],
    )
    return model, validation, root / "run"


@pytest.mark.parametrize(("name", "count"), [("held_out", 7), ("again", 5)])
def test_evaluation_and_export_agree_with_transformers(run: tuple[Path, Path, Path], name: str, count: int) -> None:
    model, validation, run_dir = run
    pairs = tokenized_pairs(
        validation.with_name("again.jsonl") if name == "again" else validation, model, max_length=2048
    )
    reference, policy = pair_logps(model, pairs), pair_logps(run_dir / "hf", pairs)

    lines = [line for line in metrics(run_dir) if f"eval/{name}/loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0][f"eval/{name}/loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    last = lines[-1]
    margins = [BETA * ((policy[i][0] - reference[i][0]) - (policy[i][1] - reference[i][1])) for i in sorted(reference)]
    expected = {
        "loss": float(-torch.nn.functional.logsigmoid(torch.tensor(margins, dtype=torch.float64)).mean()),
        "logps/chosen": sum(p[0] for p in policy.values()) / len(pairs),
        "logps/rejected": sum(p[1] for p in policy.values()) / len(pairs),
        "rewards/margins": sum(margins) / len(pairs),
        "rewards/accuracies": sum(m > 0 for m in margins) / len(pairs),
        "logps/accuracies": sum(p[0] > p[1] for p in policy.values()) / len(pairs),
        "lengths/chosen": sum(len(pair.chosen) for pair in pairs) / len(pairs),
        "rewards/length_correlation": float(
            np.corrcoef([len(pair.chosen) - len(pair.rejected) for pair in pairs], margins)[0, 1]
        ),
        "pairs": count,
    }
    for key, value in expected.items():
        assert last[f"eval/{name}/{key}"] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_scoring_the_run_says_what_its_evaluation_said(run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """To the last bit of a pair's log-probs: both are one path. The model is the run's checkpoint."""
    model, validation, run_dir = run
    words = [
        *("+model=hf", f"model.checkpoint={run_dir}", f"reference.hf_path={model}", f"data.train_path={validation}"),
        *("data.tokens_per_microbatch=128", "parallel.tensor=2", "parallel.pipeline=2", "train.global_batch_size=4"),
        *("precision.dtype=fp32", "device.kind=cpu", f"loss.beta={BETA}"),
    ]
    launch(4, score_pairs, words, tmp_path / "scores.jsonl")
    told = json.loads((tmp_path / "scores.summary.json").read_text())
    last = [line for line in metrics(run_dir) if "eval/held_out/loss" in line][-1]
    shared = [key for key in told if f"eval/held_out/{key}" in last]
    assert {"logps/chosen", "logps/accuracies", "rewards/margins", "rewards/accuracies", "pairs"} < set(shared)
    for key in shared:
        assert told[key] == pytest.approx(last[f"eval/held_out/{key}"], rel=1e-13), key
    assert told["model"] == told["reference"] == "model"  # the run was started from it


def test_training_lines_are_means_of_their_interval(run: tuple[Path, Path, Path]) -> None:
    lines = [line for line in metrics(run[2]) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["loss"] != pytest.approx(0.6931471805599453, abs=1e-6)  # step 1 shows ln 2, step 2 does not
    assert lines[0]["pairs"] == 4.0
    assert lines[0]["epoch"] == pytest.approx(8 / 12)
    assert lines[0]["tokens"] / 2 < lines[0]["tokens/computed"] < lines[0]["tokens"]  # prompts are computed once
    assert 0 < lines[0]["time/reference_s"] < lines[0]["time/step_s"]
    assert 0 <= lines[0]["time/data_s"] < lines[0]["time/step_s"]
    assert 0 < lines[0]["tokens/padding"] < 1
    assert lines[0]["throughput/tflops_per_rank"] > 0


def test_side_files_are_the_source_s_own(run: tuple[Path, Path, Path]) -> None:
    model, _, run_dir = run
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (run_dir / "hf" / name).read_bytes() == (model / name).read_bytes(), name
    card = (run_dir / "hf" / "README.md").read_text()
    assert f"beta: {BETA}" in card
    assert "rewards/accuracies" in card
    assert "Health of the run: not judged: 4 updates on 16 pairs are too few" in card
    assert load_hf(run_dir / "hf").config.architectures == ["Qwen3ForCausalLM"]


def test_run_directory_holds_what_the_contract_says(run: tuple[Path, Path, Path]) -> None:
    run_dir = run[2]
    names = {"config.yaml", "data.json", "health.json", "tokens", "metrics.jsonl", "tensorboard", "checkpoints", "hf"}
    assert {p.name for p in run_dir.iterdir()} == names
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_00000004"
    assert any("tfevents" in name for name in os.listdir(run_dir / "tensorboard"))
    keys = set(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[1]))
    assert keys >= {
        *("step", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected", "logps/accuracies", "grad_norm", "lr", "epoch", "pairs", "tokens"),
        *("rewards/length_correlation", "lengths/chosen", "lengths/rejected"),
        *("tokens/computed", "tokens/padding", "time/step_s", "time/reference_s", "time/data_s"),
        *("throughput/pairs_per_s", "throughput/tokens_per_s", "throughput/tflops_per_rank", "memory/peak_gib"),
    }
    assert "throughput/mfu" not in keys  # a CPU has no data sheet


def test_ranks_that_have_drifted_apart_are_not_exported(run: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"decoder.final_layernorm.weight differs between tensor-parallel ranks"):
        launch(2, export_with_ranks_apart, str(run[0]), str(tmp_path / "hf"))
    assert not list(tmp_path.glob("hf/*.safetensors"))
