"""Machines of a cluster, played on this one: agents on loopback, and stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "docker" / "launch.sh"
SBATCH = ROOT / "docker" / "slurm" / "train.sbatch"

# srun as train.sbatch uses it: the command once a node, its output in a file a node, the first failure ends the others.
_SRUN = """
import os, re, subprocess, sys, time
words = sys.argv[1:]
options = {}
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
with open(os.environ["STUB_LOG"], "a") as log:
    print("srun", *sys.argv[1:], file=log)
cpus = sorted(os.sched_getaffinity(0))
tasks = []
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    names = {"%j": os.environ["SLURM_JOB_ID"], "%N": f"node{node}", "%%": "%"}
    path = re.sub("%.", lambda found: names[found[0]], options["--output"])
    environment = {**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
    os.sched_setaffinity(0, {cpus[node % len(cpus)]})
    with open(path, "a" if options["--open-mode"] == "append" else "w") as output:
        tasks.append(subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT))
while True:
    codes = [task.poll() for task in tasks]
    if any(codes) and options["--kill-on-bad-exit"] == "1":
        for task in tasks:
            task.terminate()
    if None not in codes:
        sys.exit(max(map(abs, codes)))
    time.sleep(0.1)
"""
_SCONTROL = """
import os, sys
with open(os.environ["STUB_LOG"], "a") as log:
    print("scontrol", *sys.argv[1:], file=log)
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
"""


def write_slurm(directory: Path) -> Path:
    """Stand-ins for srun and scontrol, which note every call in $STUB_LOG; the directory to put on PATH."""
    directory.mkdir()
    for name, code in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        write_command(directory / name, code)
    return directory


def write_command(path: Path, code: str) -> None:
    """A command of this Python."""
    script = path.with_suffix(".py")
    script.write_text(code)
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    path.chmod(0o755)


def environment(*directories: Path, **variables: str) -> dict[str, str]:
    """This process's environment on a machine of its own: this checkout, torchrun, and loopback as its address."""
    base = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([*map(str, directories), str(Path(sys.executable).parent), base["PATH"]])
    return {
        **base,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RANKS_PER_NODE": "1",
        "NODE_ADDRESS": "127.0.0.1",
        "JOIN_TIMEOUT_S": "240",
        **variables,
    }


def start_node(rank: int, words: list[str], variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A machine started by hand, on a CPU of its own: more threads would sum in another order."""
    cpus = sorted(os.sched_getaffinity(0))
    with log.open("wb") as output:
        return subprocess.Popen(
            [LAUNCH, "tools/train.py", *words],
            env=environment(NODE_RANK=str(rank), **variables),
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpus[rank % len(cpus)]}),
        )
