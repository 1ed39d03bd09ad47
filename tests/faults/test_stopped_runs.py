"""Runs that are told to stop, or hang: they save and end, go on as if unhurt, or say who is missing, or slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megadpo.checkpoint.description import metrics_of
from megadpo.checkpoint.directory import list_checkpoints, step_of
from tests.helpers.jobs.stopping import Told, train_and_stop, train_beside_a_slow_rank
from tests.helpers.jobs.training import train
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_bit_equal, metrics, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all runs here have in common, over two and a half epochs with evaluations; but for the run directory."""
    root = tmp_path_factory.mktemp("stopped")
    model = write_tiny_model(root / "model", "llama", num_layers=2)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(15, seed=5))
    common = ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "device.kind=cpu", "trackers=jsonl"]
    common += ["precision.dtype=fp32", "optimizer.lr=1e-3", f"train.max_steps={STEPS}", "data.validation_fraction=0.2"]
    return [*common, "train.global_batch_size=4", "train.eval_every=2", "train.save_every=4", "train.resume=auto"]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two data-parallel ranks."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    launch(2, train, [*words, f"train.run_dir={run_dir}"])
    return run_dir


def test_stopped_at_any_place_a_run_goes_on_as_if_it_had_not_been(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    """In the reference pass, in an evaluation that ends at the next update, in a save; told to one rank or to all."""
    run_dir = tmp_path / "run"
    told = [
        Told("reference pass", 3, (1,), signal.SIGUSR1),  # of step 2, after which an evaluation is due
        Told("reference pass", 2, (0, 1), None),  # of step 3, after the evaluation that was left out
        Told("evaluation", 1, (0, 1), signal.SIGTERM),  # that of step 4
        Told("save", 1, (0,), signal.SIGTERM),  # of step 8
    ]
    (ends, others) = launch(
        2, train_and_stop, [*words, f"train.run_dir={run_dir}", "checkpoint.keep_best=eval/loss"], told
    )
    assert ends == others
    assert [end.partition(":")[0] for end in ends[:-1]] == [
        "stopped by SIGUSR1 after step 2",
        "broken off in reference pass 2",
        "stopped by SIGTERM after step 5",
        "stopped by SIGTERM after step 9",
    ]
    assert_bit_equal(whole, run_dir)
    kept = list_checkpoints(run_dir / "checkpoints")
    assert [step_of(path) for path in kept] == [2, 9, 10], "step 2 was found to be the best after it was saved"
    (late,) = [line for line in metrics(run_dir) if line["step"] == 2 and "eval/loss" in line]
    assert {"step": 2, **metrics_of(kept[0])} == late


def test_a_slow_rank_is_named_and_changes_nothing(words: list[str], whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    logs = launch(2, train_beside_a_slow_rank, [*words, f"train.run_dir={run_dir}"], 1, 0.3)
    told = [line for line in logs[0] if line.startswith("straggler")]
    assert [line.partition(" s a step")[0][:22] for line in told] == ["straggler: rank 1 was "]
    assert_bit_equal(whole, run_dir)


def command(words: list[str], *, restarts: int = 0) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(f"--max-restarts={restarts}", str(ROOT / "tools" / "train.py"), *words),
    ]


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"} | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"  # as docker/launch.sh sets it for restarts
    }


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or f'"step": {step},' not in (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_torchrun_is_told_to_stop_and_a_budget_runs_out(words: list[str], whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    own = [*words, f"train.run_dir={run_dir}"]
    # The budget is over at once; torchrun starts the ranks again, which is not what was asked for.
    first = subprocess.run(
        command([*own, "train.max_hours=1e-6"], restarts=1),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode != 0
    assert f"stopped by train.max_hours=1e-06 after step 1: {run_dir} goes on with" in first.stderr
    assert "this launch was stopped by train.max_hours=1e-06 after step 1: it is not begun again" in first.stderr
    assert "exitcode  : 75" in first.stderr
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step_00000001"]

    long = [word for word in own if "max_steps" not in word] + ["train.max_steps=100000"]
    with subprocess.Popen(command(long), env=environment(), stderr=subprocess.PIPE, text=True) as second:
        wait_for_step(run_dir, 3, second)
        second.send_signal(signal.SIGTERM)
        _, said = second.communicate(timeout=120)
    assert "stopped by SIGTERM after step" in said
    stopped = step_of(list_checkpoints(run_dir / "checkpoints")[-1])
    assert [line["step"] for line in metrics(run_dir) if "loss" in line] == list(range(1, stopped + 1))
    assert not (run_dir / "hf").exists()


def test_a_rank_that_hangs_is_named(words: list[str], tmp_path: Path) -> None:
    """Nothing but the stopped rank may take as long as that, on any machine: no checkpoints are written either."""
    run_dir = tmp_path / "run"
    own = [*words, f"train.run_dir={run_dir}", "parallel.timeout_s=8", "train.save_every=null"]
    long = [word for word in own if "max_steps" not in word] + ["train.max_steps=100000"]
    variables = environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    with subprocess.Popen(command(long), env=variables, stderr=subprocess.PIPE, text=True) as run:
        wait_for_step(run_dir, 2, run)
        ranks = {_environment(child).get("RANK"): child for child in psutil.Process(run.pid).children(recursive=True)}
        ranks["1"].suspend()
        stopped = time.monotonic()
        ranks["0"].wait(timeout=120)
        waited = time.monotonic() - stopped
        ranks["1"].kill()  # torchrun would do so after 30 seconds
        _, said = run.communicate(timeout=60)
    assert 7 < waited < 60
    assert "no rank has moved for 8 s (parallel.timeout_s)" in said
    assert "rank 1 IS SILENT; it was at step " in said
    assert "rank 0 at step " in said
    assert "exitcode  : 70" in said


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
