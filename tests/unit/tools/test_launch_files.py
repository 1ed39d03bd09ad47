"""The launchers say one thing: Kubernetes' manifest starts what a hand would start, and every key named is a key."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from megadpo.config.compose import compose_config
from megadpo.config.schema import Config
from tests.helpers.cluster import LAUNCH, ROOT, SBATCH, write_command

MANIFEST = ROOT / "docker" / "kubernetes" / "pytorchjob.yaml"


@pytest.fixture
def torchrun(tmp_path: Path) -> Path:
    """A directory with a torchrun that says its arguments and the environment's settings, one a line."""
    write_command(
        tmp_path / "torchrun",
        "import os, sys\n"
        "names = ('CUDA_DEVICE_MAX_CONNECTIONS', 'NCCL_DEBUG', 'PET_SIGNALS_TO_HANDLE')\n"
        "names = (*names, 'TORCH_ELASTIC_SHUTDOWN_TIMEOUT')\n"
        "print(*(f'{n}={os.environ[n]}' for n in names), sep='\\n')\n"
        "print(*sys.argv[1:], sep='\\n')",
    )
    return tmp_path


def run(command: list[str], torchrun: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": f"{torchrun}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def by_hand(torchrun: Path, *words: str, **variables: str) -> list[str]:
    result = run([str(LAUNCH), *words], torchrun, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.path_dependent
def test_the_node_script_hands_torchrun_what_it_was_told(torchrun: Path) -> None:
    meeting = {"NNODES": "4", "HEAD": "node0:29400"}
    said = by_hand(torchrun, "tools/score.py", "+model=hf", "output=a b", **meeting, NODE_RANK="2")
    assert said == [
        *("CUDA_DEVICE_MAX_CONNECTIONS=1", "NCCL_DEBUG=WARN"),
        *("PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"),
        *("--nnodes", "4", "--nproc-per-node", "gpu", "--max-restarts", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29400"),
        *("--rdzv-id", "megadpo", "--rdzv-conf", "is_host=false,join_timeout=900,read_timeout=900"),
        *(f"{ROOT}/tools/score.py", "+model=hf", "output=a b"),
    ]
    told = {"RUN_ID": "x", "RANKS_PER_NODE": "2", "NODE_ADDRESS": "10.0.0.1", "JOIN_TIMEOUT_S": "5"}
    told |= {"MAX_RESTARTS": "7", "SAVE_WITHIN_S": "90"}
    said = by_hand(torchrun, "tools/train.py", **meeting, **told, SLURM_NODEID="0", NCCL_DEBUG="INFO")
    assert {"is_host=true,join_timeout=5,read_timeout=5", "2", "x", "10.0.0.1", "NCCL_DEBUG=INFO"} <= set(said)
    assert said[said.index("--local-addr") + 1] == "10.0.0.1"
    assert said[said.index("--max-restarts") + 1] == "7"
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90" in said

    everything = {**meeting, "NODE_RANK": "0"}
    for name in everything:
        without = {key: value for key, value in everything.items() if key != name}
        result = run([str(LAUNCH), "tools/train.py"], torchrun, **without)
        assert result.returncode != 0
        assert f"set {name if name == 'NODE_RANK' else 'it'} to" in result.stderr
        assert "see the head of docker/launch.sh" in result.stderr
    assert "name the tool to run" in run([str(LAUNCH)], torchrun, **everything).stderr


@pytest.mark.path_dependent
def test_kubernetes_starts_what_a_hand_would_start(torchrun: Path) -> None:
    job: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    master, workers = replicas["Master"], replicas["Worker"]
    assert master["replicas"] == 1
    assert master["template"] == workers["template"]
    assert master["restartPolicy"] == workers["restartPolicy"] == "OnFailure"
    (container,) = master["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for it, and for the port's name
    assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]
    assert not container["image"].endswith(":latest")
    # Longer than launch.sh lets ranks save.
    assert master["template"]["spec"]["terminationGracePeriodSeconds"] > 600

    # Kubernetes fills in $(NAME) from the container's environment, to which the operator adds these.
    port = str(container["ports"][0]["containerPort"])
    operator = {"RANK": "1", "MASTER_ADDR": f"{job['metadata']['name']}-master-0", "MASTER_PORT": port}
    settings = {item["name"]: item.get("value", "10.1.2.3") for item in container["env"]}
    command = [re.sub(r"\$\((\w+)\)", lambda m: operator[m[1]], word) for word in container["command"]]
    started = run(command, torchrun, **operator, **settings)
    assert started.returncode == 0, started.stderr
    machines = 1 + workers["replicas"]
    words = command[command.index("tools/train.py") + 1 :]
    expected = {"NNODES": str(machines), "NODE_RANK": "1", "HEAD": f"megadpo-master-0:{port}"}
    assert started.stdout.splitlines() == by_hand(torchrun, "tools/train.py", *words, **expected, **settings)

    config = compose_config(words)
    assert config.train.resume == "auto"
    assert config.train.save_every
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in master["template"]["spec"]["volumes"]}
    for path in (config.model.checkpoint, *config.data.train_path, config.train.run_dir):
        assert Path(str(path)).parts[:2] == ("/", "shared")
    gpus = machines * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus % (config.parallel.tensor * config.parallel.pipeline) == 0
    assert config.parallel.tensor <= container["resources"]["limits"]["nvidia.com/gpu"]


def test_keys_and_files_that_the_launch_files_name_exist() -> None:
    groups = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}
    keys = {f"{group}.{item.name}" for group, kind in groups.items() for item in fields(kind)}
    named: set[str] = set()
    for path in (LAUNCH, SBATCH, MANIFEST, ROOT / "docs" / "clusters.md"):
        text = path.read_text()
        named |= set(re.findall(rf"(?<![\w/])(?:{'|'.join(groups)})\.[a-z_]+\b", text)) - {SBATCH.name}
        for file in re.findall(r"\b(?:docker|tools|conf|tests)/[\w./-]+\.\w+\b", text):
            assert (ROOT / file).is_file(), f"{path.name} names {file}"
        for name in re.findall(r"\+model=(\w+)", text):
            assert name == "NAME" or (ROOT / "conf" / "model" / f"{name}.yaml").is_file()
    assert {"train.run_dir", "train.save_every"} <= named
    assert named <= keys, named - keys


def test_slurm_reads_its_options(tmp_path: Path) -> None:
    """Options count only above the first command; each on a line of its own, since not every Slurm allows comments."""
    lines = SBATCH.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(option) < first_command for option in options)
    assert all(re.fullmatch(r"#SBATCH --[\w-]+(=\S+)?", option) for option in options)
    assert {"#SBATCH --requeue", "#SBATCH --ntasks-per-node=1", "#SBATCH --open-mode=append"} <= set(options)
    assert "#SBATCH --signal=B:USR1@600" in options
    assert any("SAVE_WITHIN_S:-480" in line for line in lines), "the signal comes before what ranks may take"
    assert "trap at_time_limit USR1" in lines
