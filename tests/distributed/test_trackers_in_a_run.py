"""Trackers in a real run: no secret in any of its files, one W&B run over an interruption, and none that stops it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.jobs.training import train_in_environment
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import metrics, write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.wandb_files import wandb_runs

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")


def test_no_secret_in_the_files_of_a_run_and_a_broken_tracker_does_not_stop_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    environment = {name: f"SENTINEL{name.replace('_', '')}{'0' * 40}" for name in SECRETS}
    environment |= {f"WANDB_{name}_DIR": str(tmp_path / "home" / name) for name in ("CACHE", "CONFIG", "DATA")}
    environment["WANDB_MODE"] = "offline"
    words = [
        "+model=hf",
        f"model.hf_path={write_tiny_model(tmp_path / 'model', 'llama', num_layers=1)}",
        f"data.train_path={write_jsonl(tmp_path / 'pairs.jsonl', make_pairs(8, seed=3))}",
        "data.validation_fraction=0.25",
        "device.kind=cpu",
        "trackers=[jsonl,tensorboard,wandb]",
        "train.global_batch_size=4",
        "train.resume=auto",
        f"train.run_dir={run_dir}",
    ]
    launch(1, train_in_environment, [*words, "train.max_steps=1"], environment)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.yaml", "metrics.jsonl", "README.md", "training.json"}
    assert [path for path in files if b"SENTINEL" in path.read_bytes()] == []

    shutil.rmtree(run_dir / "tensorboard")
    (run_dir / "tensorboard").write_text("no directory")
    launch(1, train_in_environment, [*words, "train.max_steps=2"], environment)
    assert (run_dir / "hf" / "model.safetensors").is_file()
    rows = [(line["step"], "loss" in line) for line in metrics(run_dir)]
    assert rows == [(0, False), (1, True), (1, False), (2, True), (2, False)]
    first, second = wandb_runs(run_dir)
    assert first["id"] == second["id"]
    assert (list(first["rows"]), list(second["rows"])) == ([0, 1], [2])
    assert {"loss", "eval/loss"} <= first["rows"][1].keys()
    assert first["config"]["optimizer"]["lr"] == 1e-6
