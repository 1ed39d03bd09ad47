"""The command itself: mistakes are told once, all of them, before anything is built or written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.pairs import make_pairs
from tests.helpers.runs import training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train.py"
# tools/train.py, where other ranks give rank 0 a minute to end in place of seconds: a busy machine may take them.
PATIENT = f"""
import runpy
import megadpo.commands.command_line
megadpo.commands.command_line._SECONDS_FOR_RANK_0 = 60.0
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("command")
    return write_tiny_model(root / "model", "llama"), write_jsonl(root / "pairs.jsonl", make_pairs(6, seed=0))


def command(cwd: Path, *words: str, ranks: int = 0, tool: Path = TOOL) -> subprocess.CompletedProcess[str]:
    """Runs tools/train.py, or what starts it, in `cwd`; under torchrun when `ranks` is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    return subprocess.run(
        [sys.executable, *launcher, str(tool), *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_no_model_is_a_list_of_models(tmp_path: Path) -> None:
    result = command(tmp_path)
    assert result.returncode == 2
    assert "add +model=NAME, one of demo, hf" in result.stderr
    assert "Traceback" not in result.stderr


def test_all_mistakes_at_once_and_nothing_written(tmp_path: Path, files: tuple[Path, Path]) -> None:
    model, data = files
    result = command(
        tmp_path,
        *("+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu"),
        *("data.train_pth=x", "optimizer.lr=abc", "loss.beta=-1", "parallel.tensor=3", "train.eval_every=3"),
    )
    assert result.returncode == 2
    for text in (
        "data.train_pth=x: unknown key; did you mean data.train_path?",
        "optimizer.lr=abc: must be a number",
        "loss.beta=-1.0: must be a finite number > 0",
        "must divide the world size 1",
        "must divide the model's 4 attention heads",
        "train.eval_every=3: has no effect without a validation set",
    ):
        assert text in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_model_is_told_with_the_other_mistakes(tmp_path: Path, files: tuple[Path, Path]) -> None:
    model, data = files
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "mlp_bias": True, "novel_trick": 3}))
    result = command(tmp_path, "+model=hf", "model.hf_path=model", f"data.train_path={data}", "loss.beta=0")
    assert result.returncode == 2
    for text in ("mlp_bias", "novel_trick", "loss.beta=0"):
        assert text in result.stderr


def test_two_ranks_say_it_once(tmp_path: Path, files: tuple[Path, Path]) -> None:
    model, _ = files
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a"}])
    patient = tmp_path / "patient.py"
    patient.write_text(PATIENT)
    result = command(
        tmp_path,
        *("+model=hf", f"model.hf_path={model}", f"data.train_path={bad}", "device.kind=cpu", "train.run_dir=run"),
        ranks=2,
        tool=patient,
    )
    assert result.returncode != 0
    assert result.stderr.count(f"{bad}:2: ") == 1


def test_one_process_without_a_launcher_trains(tmp_path: Path, files: tuple[Path, Path]) -> None:
    model, data = files
    result = command(
        tmp_path,
        *("+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu"),
        *("train.max_steps=1", "train.global_batch_size=6", "loss=ipo", "loss.beta=0.5", "trackers=jsonl"),
    )
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "outputs").iterdir()
    assert run_dir.name.endswith("-model")
    (line,) = training_lines(run_dir)
    assert line["loss"] == pytest.approx(1.0, abs=1e-6)  # IPO without a preference: (1 / (2·0.5))²
    assert "step 1/1" in result.stderr
    assert "Warning" not in result.stderr
