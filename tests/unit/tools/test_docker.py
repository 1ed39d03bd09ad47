"""The images, as far as they can be checked without building them: their files, and the installation on stand-ins."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
# A script, not a module: `docker` is another package's name.
BROUGHT = runpy.run_path(str(ROOT / "docker" / "brought.py"))
normalise, constraints, compare = (BROUGHT[name] for name in ("normalise", "constraints", "compare"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
# What an NVIDIA image brings, by name, and the versions of two packages that it holds and the project wants newer.
STACK = {"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "transformer-engine": "2.10.0+769ed778", "apex": "0.1"}
OLD = {"packaging": "23.2", "tqdm": "4.0"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined and comments left out."""
    text = re.sub(r"\\\n\s*", "", "\n".join(x for x in path.read_text().splitlines() if not x.startswith("#")))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_pinned_clean_and_refers_to_what_exists(path: Path) -> None:
    pins = dict(re.findall(r"^(\w+)=(\S+)$", (ROOT / "docker" / "pins.env").read_text(), flags=re.M))
    lines = instructions(path)
    (argument,) = [rest for word, rest in lines if word == "ARG"]
    (base,) = [rest for word, rest in lines if word == "FROM"]
    assert base.endswith(f":${{{argument}}}")
    assert pins[argument] not in ("", "latest")
    assert argument in (ROOT / "docker" / "build.sh").read_text()
    runs = [rest for word, rest in lines if word == "RUN"]
    for run in runs:
        assert "apt-get" not in run or run.endswith("rm -rf /var/lib/apt/lists/*")
        assert not re.search(r"\bpip3? install\b", run), "docker/install.sh and make venv install"
    for source in [rest.split()[0] for word, rest in lines if word in ("COPY", "ADD")]:
        assert (ROOT / source).exists()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = re.findall(r"\bmake ([a-z-]+)", path.read_text())
    assert named
    assert set(named) <= targets
    for script in re.findall(r"\b(?:docker|tools)/[\w./-]+\.(?:sh|py|env)\b", path.read_text()):
        assert (ROOT / script).is_file()


def test_what_is_large_or_private_stays_out_of_the_images() -> None:
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert {".git", ".venv", "outputs", "wandb"} <= ignored
    # What the installation and the tests need must not be among it.
    assert not ignored & {"docker", "tests", "conf", "constraints.txt", "docs"}


@pytest.mark.path_dependent
def test_an_image_is_built_from_the_pins(tmp_path: Path) -> None:
    script = ROOT / "docker" / "build.sh"
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    docker.chmod(0o755)

    def arguments(kind: str, *words: str, **environment: str) -> list[str]:
        clean = {"PATH": os.environ["PATH"], "DOCKER": str(docker), **environment}
        result = subprocess.run([script, kind, *words], env=clean, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()

    pin = re.search(r"^NGC_TAG=(\S+)", (ROOT / "docker" / "pins.env").read_text(), flags=re.M)
    assert pin
    said = arguments("ngc")
    assert f"NGC_TAG={pin[1]}" in said
    assert said[said.index("--file") + 1].endswith("docker/ngc.Dockerfile")
    assert said[said.index("--tag") + 1] == "megadpo:ngc"
    assert Path(said[-1]).resolve() == ROOT
    other = arguments("cpu", "--no-cache", PYTHON_TAG="3.12-slim", IMAGE="mine:1")
    assert {"PYTHON_TAG=3.12-slim", "mine:1", "--no-cache"} <= set(other)
    with pytest.raises(subprocess.CalledProcessError):
        arguments("gpu")


def test_the_stack_is_kept_and_the_rest_may_be_renewed() -> None:
    brought = {**STACK, "numpy": "2.1.0", "nvidia-cublas": "13.1", "torchvision": "0.25.0a0", "tqdm": "4.60"}
    lines = constraints(["# text", "torch==2.13.0", "tqdm==4.70.1", "Some_Package==1", ""], brought)
    assert set(lines) == {
        *(f"{name}=={version}" for name, version in brought.items() if name != "tqdm"),
        "tqdm>=4.60",
        "Some_Package==1",
    }
    after = {**brought, "torch": "2.13.0", "tqdm": "4.70.1", "new": "1"}
    del after["apex"]
    assert compare(brought, after) == (
        ["apex 0.1 -> removed", "torch 2.10.0a0+b4e4ee81d3.nv25.12 -> 2.13.0"],
        ["tqdm 4.60 -> 4.70.1"],
    )
    assert compare(brought, brought) == ([], [])


def write_wheel(directory: Path, name: str, version: str, requires: list[str]) -> Path:
    """A wheel without modules."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = directory / f"{stem}-py3-none-any.whl"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    files = {
        "METADATA": "\n".join(metadata) + "\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["RECORD"] = "".join(f"{stem}.dist-info/{file},,\n" for file in (*files, "RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)
    return path


def requirements_and_pins(root: Path) -> tuple[list[Requirement], dict[str, str]]:
    """What setup.py asks for, and constraints.txt's versions."""
    (asked,) = [
        ast.literal_eval(word.value)
        for node in ast.walk(ast.parse((root / "setup.py").read_text()))
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "install_requires"
    ]
    lines = [line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = {normalise(name): version for name, version in lines}
    return [Requirement(line) for line in asked], pins


def test_installs_around_what_the_image_brings(tmp_path: Path) -> None:
    """The script that the image runs, with real pip, against an index that would offer another torch."""
    asked, pins = requirements_and_pins(ROOT)
    index, image, project = tmp_path / "index", tmp_path / "image", tmp_path / "project"
    index.mkdir()
    for requirement in asked:
        name = normalise(requirement.name)
        # As the real ones do, transformers' stand-in asks for something that the image holds in an old version.
        write_wheel(index, name, pins[name], ["tqdm>=4.27"] if name == "transformers" else [])
    write_wheel(index, "tqdm", pins["tqdm"], [])

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", image], check=True)
    (packages,) = image.glob("lib/python*/site-packages")
    for module in ("pip", "setuptools", "_distutils_hack"):
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        home = Path(spec.origin).parent
        for path in [home, *home.parent.glob(f"{module}-*.dist-info")]:
            (packages / path.name).symlink_to(path)
    for name, version in {**STACK, **OLD}.items():
        with zipfile.ZipFile(write_wheel(tmp_path, name, version, [])) as wheel:
            wheel.extractall(packages)
    constraint = tmp_path / "constraint.txt"  # as NVIDIA's images do: every version that they hold
    constraint.write_text("".join(f"{name}=={version}\n" for name, version in {**STACK, **OLD}.items()))

    (project / "megadpo").mkdir(parents=True)
    for file in ("setup.py", "pyproject.toml", "constraints.txt", "megadpo/__init__.py"):
        shutil.copy(ROOT / file, project / file)
    shutil.copytree(ROOT / "docker", project / "docker")

    def install() -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(image / "bin" / "python"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(index),
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of --no-build-isolation: there is no index to isolate from
            "PIP_CONSTRAINT": str(constraint),
        }
        return subprocess.run(
            [project / "docker" / "install.sh"], env=environment, capture_output=True, text=True, check=False
        )

    def versions() -> dict[str, str]:
        names = (path.name.removesuffix(".dist-info").rsplit("-", 1) for path in packages.glob("*.dist-info"))
        return {normalise(name): version for name, version in names}

    result = install()
    assert result.returncode == 0, result.stdout + result.stderr
    found = versions()
    assert {name: found[name] for name in STACK} == STACK
    renewed = {"packaging": pins["packaging"], "tqdm": pins["tqdm"]}
    assert {name: found[name] for name in renewed} == renewed
    others = {normalise(requirement.name) for requirement in asked} - {"torch"}
    assert {name: found[name] for name in others} == {name: pins[name] for name in others}
    assert "megadpo" in found
    assert "renewed: packaging 23.2 -> " in result.stdout

    # A torch too old for the project can't be renewed: refused by name, and left as it is.
    for path in packages.glob("torch-*.dist-info"):
        shutil.rmtree(path)
    with zipfile.ZipFile(write_wheel(tmp_path, "torch", "2.5.0+nv24.9", [])) as wheel:
        wheel.extractall(packages)
    result = install()
    assert result.returncode != 0
    assert "torch==2.5.0+nv24.9" in result.stdout + result.stderr
    assert versions()["torch"] == "2.5.0+nv24.9"
