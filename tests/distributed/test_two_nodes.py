"""Runs over two machines, played by two launchers on loopback: by hand, then under Slurm's script with stand-ins."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megadpo.checkpoint.directory import list_checkpoints
from tests.helpers.cluster import ROOT, SBATCH, environment, start_node, write_slurm
from tests.helpers.jobs.training import train
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.ports import free_port
from tests.helpers.runs import assert_bit_equal, write_jsonl
from tests.helpers.tiny_models import write_tiny_model


def write_inputs(root: Path) -> list[str]:
    """Words of a run of two pipeline stages, one a machine, that saves every step."""
    model = write_tiny_model(root / "model", "qwen3", num_layers=2)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(12, seed=3))
    return [
        *("+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "data.tokens_per_microbatch=700"),
        *("device.kind=cpu", "precision.dtype=fp32", "parallel.pipeline=2", "trackers=jsonl"),
        *("train.global_batch_size=4", "train.save_every=1", "optimizer.lr=1e-3", "optimizer.schedule=constant"),
    ]


def preempt(nodes: list[subprocess.Popen[bytes]], run_dir: Path, log: Path) -> int:
    """Stops both machines as a scheduler does, as soon as a checkpoint is there; the newest one's step."""
    try:
        deadline = time.monotonic() + 240
        while not (run_dir / "checkpoints" / "latest").exists():
            assert all(node.poll() is None for node in nodes), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        assert all(node.wait(timeout=60) != 0 for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    return int(list_checkpoints(run_dir / "checkpoints")[-1].name.removeprefix("step_"))


def test_a_run_by_hand_is_preempted_and_goes_on_under_slurm_bit_equal(tmp_path: Path) -> None:
    words = write_inputs(tmp_path)
    run_dir, log = tmp_path / "run", tmp_path / "head.log"
    port = free_port(range(20000, 30000))
    meeting = {"NNODES": "2", "HEAD": f"127.0.0.1:{port}"}
    by_hand = [*words, f"train.run_dir={run_dir}", "train.resume=auto", "train.max_steps=2000"]
    # The head comes last: the other machine waits for it.
    nodes = [start_node(1, by_hand, meeting, tmp_path / "node1.log"), start_node(0, by_hand, meeting, log)]
    done = preempt(nodes, run_dir, log)

    steps = f"train.max_steps={done + 2}"
    stubs, calls = write_slurm(tmp_path / "bin"), tmp_path / "calls"
    job = environment(
        stubs,
        STUB_LOG=str(calls),
        RUN_DIR=str(run_dir),
        IMAGE="registry.example.com#megadpo:ngc",
        MOUNTS=f"{tmp_path}:{tmp_path}",
        REPOSITORY=str(SBATCH.parents[2]),
        SLURM_JOB_ID=str(70000 + port - 20000),  # from which the script makes the port
        SLURM_RESTART_COUNT="1",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="127.0.0.1,node1",
    )
    result = subprocess.run([SBATCH, *words, steps], env=job, capture_output=True, text=True, timeout=240, check=False)
    logs = {path.name: path.read_text() for path in (tmp_path / "run.logs").iterdir()}
    assert result.returncode == 0, result.stdout + result.stderr + "".join(logs.values())
    assert re.search(rf"start 2 on 127.0.0.1 node1: newest checkpoint step_0*{done},", result.stdout)
    assert "ends with status 0" in result.stdout
    head, other = sorted(logs)
    assert (head[-10:], other[-10:]) == ("-node0.log", "-node1.log")
    assert "2 ranks on cpu: tensor 1, pipeline 2, data 1" in logs[head]
    (srun,) = [line for line in calls.read_text().splitlines() if line.startswith("srun ")]
    for option in (f"--container-image={job['IMAGE']}", f"--container-mounts={job['MOUNTS']}", "--kill-on-bad-exit=1"):
        assert f" {option} " in srun

    launch(2, train, [*words, steps, f"train.run_dir={tmp_path / 'whole'}"])
    assert_bit_equal(tmp_path / "whole", run_dir)


# srun whose ranks save ($SAVES is the checkpoint) and end when they are told to, or don't listen for longer than
# SAVE_WITHIN_S is there. Whoever reads of them in $STUB_LOG may signal them.
_LISTENS = """#!/bin/sh
trap 'mkdir -p "$RUN_DIR/checkpoints"; echo "$SAVES" > "$RUN_DIR/checkpoints/latest"; kill "$!"; exit 75' USR1
echo "srun $*" >> "$STUB_LOG"
sleep 60 & wait
"""
_IS_DEAF = """#!/bin/sh
trap '' USR1
echo "srun $*" >> "$STUB_LOG"
sleep 6
exit 3
"""


def time_limit(job: dict[str, str], calls: Path) -> tuple[int, str]:
    """Exit status and output of the script when its job is told about its time limit."""
    calls.unlink(missing_ok=True)
    with subprocess.Popen(
        [SBATCH, "+model=hf"], env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as script:
        while not (calls.exists() and "srun" in calls.read_text()):
            assert script.poll() is None
            time.sleep(0.02)
        script.send_signal(signal.SIGUSR1)
        output, _ = script.communicate(timeout=60)
        return script.returncode, output


@pytest.mark.path_dependent
def test_the_slurm_script_saves_and_requeues_at_the_time_limit(tmp_path: Path) -> None:
    stubs, calls = write_slurm(tmp_path / "bin"), tmp_path / "calls"
    (stubs / "srun").write_text(_LISTENS)
    job = environment(stubs, STUB_LOG=str(calls), RUN_DIR=str(tmp_path / "100%"), SAVES="none")
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a,b"}

    status, output = time_limit(job, calls)
    assert status == 75
    assert "time limit: not requeued, because this job has saved no checkpoint" in output
    assert "scontrol requeue" not in calls.read_text()
    # Without a container the program is the checkout from which the job was submitted.
    assert f"{ROOT}/docker/launch.sh tools/train.py train.run_dir={tmp_path / '100%'}" in calls.read_text()
    assert f"--output={tmp_path}/100%%.logs/%j-%N.log" in calls.read_text()
    assert "--container" not in calls.read_text()

    status, output = time_limit({**job, "SAVES": "step_00000050"}, calls)
    assert status == 75
    assert "time limit: the ranks are told to save and to end" in output
    assert "time limit: requeued; goes on from step_00000050" in output
    assert calls.read_text().count("scontrol requeue 7") == 1

    (stubs / "srun").write_text(_IS_DEAF)
    status, output = time_limit({**job, "SAVE_WITHIN_S": "1"}, calls)
    assert status == 3
    assert "time limit: the ranks have not ended within 1 s" in output
    assert "not requeued, because this job has saved no checkpoint" in output, "nothing came after step_00000050"


@pytest.mark.path_dependent
def test_the_slurm_script_refuses_what_it_sets_itself(tmp_path: Path) -> None:
    stubs, calls = write_slurm(tmp_path / "bin"), tmp_path / "calls"
    job = environment(stubs, STUB_LOG=str(calls), RUN_DIR=str(tmp_path / "run"))
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a,b"}
    for words, variables, said in (
        (["train.resume=never"], {}, "train.resume=never: this script sets it"),
        ([], {"RUN_DIR": ""}, "RUN_DIR: set it to the directory of the run"),
        ([], {"IMAGE": "x.sqsh"}, "MOUNTS: set it to what the container needs"),
        ([], {"SLURM_SUBMIT_DIR": str(tmp_path)}, f"{tmp_path}: no docker/launch.sh there: submit from the clone, or"),
    ):
        refused = subprocess.run(
            [SBATCH, *words], env={**job, **variables}, capture_output=True, text=True, check=False
        )
        assert refused.returncode != 0
        assert said in refused.stderr
    assert not calls.exists()
