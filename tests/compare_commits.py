"""Trains the same tiny models at two commits through the public commands, and compares everything they write.

    make compare BASE=COMMIT [HEAD=COMMIT]
    python -m tests.compare_commits BASE [HEAD] [--only NAME] [--scratch DIR]

For refactorings: HEAD, the working tree with its uncommitted changes unless a commit is given, must compute what BASE
computes, to the last bit. Both run on this machine with the packages of this environment and one thread a process
(OMP_NUM_THREADS=1); another machine, or another number of threads, adds up in another order.

Compared are exit statuses, the names of all files, the values of metrics.jsonl, scores and the few other files that
hold times (BY_VALUE in tests/helpers/comparison.py), and the SHA-256 of every other file: exported models (hf/) with
their cards, weights and optimizer states of checkpoints, config.yaml, health.json. The only values left out are those
named in UNSTABLE beside it, which depend on the clock, on memory or on the age of files. Both sides run in the same
directory, one after the other, so that paths in files are equal too. What is printed is not compared. Exit status 1,
and all files kept, where anything differs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tests.conftest  # noqa: F401 - one thread a process and no network, as in all tests
from tests.helpers.comparison import compare_directories

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Command:
    """A call of a tool with its words, on so many ranks under torchrun (0: without), and how it must end."""

    tool: str
    ranks: int
    words: str
    status: int = 0


def _train(ranks: int, words: str, status: int = 0) -> Command:
    common = "data.train_path=../../inputs/pairs.jsonl data.template_date=2026-01-01 device.kind=cpu trackers=[jsonl]"
    sizes = (
        "data.tokens_per_microbatch=720 data.workers=1 train.global_batch_size=5 optimizer.lr=1e-3 train.run_dir=run"
    )
    return Command("train", ranks, f"+model=hf {common} {sizes} {words}", status)


_MODEL, _OTHER = "../../inputs/model", "../../inputs/other"
_HF = f"model.hf_path={_MODEL}"
_EVALUATED = f"{_HF} data.validation_fraction=0.2 train.eval_every=2 train.save_every=2 train.check_ranks_every=1"
_RESUMED = f"{_EVALUATED} train.resume=auto precision.dtype=bf16"
_MIX = f"{_HF} loss.name=[sigmoid,sft] loss.weights=[1,0.5] loss.ld_alpha=0.5"
_FP8 = "precision.fp8=tensorwise precision.fp8_backend=emulate precision.fp8_check_every=2"
# By name; the commands of a scenario run one after the other in a directory of its own.
SCENARIOS = {
    "pipeline=2, evaluated, saved, exported again": [
        _train(2, f"{_EVALUATED} parallel.pipeline=2 precision.dtype=fp32 train.max_steps=6"),
        Command("convert", 1, "export --checkpoint run --out exported --device cpu"),
    ],
    "resumed in bf16, then at tensor=2": [
        _train(2, f"{_RESUMED} parallel.pipeline=2 train.max_steps=3"),
        _train(2, f"{_RESUMED} parallel.pipeline=2 train.max_steps=5"),
        _train(2, f"{_RESUMED} parallel.tensor=2 train.max_steps=7"),
    ],
    "one rank, TR-DPO, emulated FP8": [
        _train(0, f"{_HF} reference.sync_every=2 {_FP8} train.max_steps=5 train.save_every=4"),
    ],
    "tensor=2 x pipeline=2, LD-DPO mix": [
        _train(4, f"{_MIX} parallel.tensor=2 parallel.pipeline=2 precision.dtype=fp32 train.max_steps=4"),
    ],
    "data=2, cached reference, recomputed": [
        _train(
            2,
            f"{_HF} reference.mode=cached parallel.overlap_grad_reduce=true model.recompute_granularity=full"
            " train.max_steps=4 optimizer.schedule=cosine optimizer.warmup_steps=2 optimizer.weight_decay=0.01",
        ),
    ],
    "imported, scored, exported, verified": [
        Command("convert", 1, f"import --hf {_MODEL} --out imported --device cpu"),
        Command(
            "score",
            2,
            f"+model=hf model.checkpoint=imported reference.hf_path={_OTHER} output=scores.jsonl parallel.tensor=2"
            " data.train_path=../../inputs/pairs.jsonl data.template_date=2026-01-01 data.workers=1 device.kind=cpu",
        ),
        Command("convert", 1, "export --checkpoint imported --out exported --device cpu"),
        Command("convert", 0, f"verify --hf {_OTHER} --checkpoint imported --device cpu", status=3),
    ],
    "refused": [_train(0, "loss.beta=-1 data.train_pth=x", status=2)],
}


def main(arguments: Sequence[str]) -> int:
    """Runs the comparison of the command line; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="commit to compare with")
    parser.add_argument("head", metavar="HEAD", nargs="?", help="commit that is compared; default: the working tree")
    parser.add_argument("--only", metavar="NAME", default="", help="scenarios with this in their names")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where everything is written for the while")
    options = parser.parse_args(arguments)
    scenarios = {name: commands for name, commands in SCENARIOS.items() if options.only in name}
    if not scenarios:
        parser.error(f"--only {options.only!r}: must be a part of a scenario's name: {'; '.join(SCENARIOS)}")
    commits = {"BASE": options.base, "HEAD": options.head}
    for commit in filter(None, commits.values()):
        if git("rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}", check=False).returncode:
            parser.error(f"{commit!r} is no commit of this repository")

    root = Path(tempfile.mkdtemp(prefix="compare_", dir=options.scratch)).resolve()
    console = Console(highlight=False)
    checkouts = {side: check_out(commit, root / "checkouts" / side) for side, commit in commits.items()}
    write_inputs(root / "inputs")
    statuses = {side: run_all(side, checkout, root, scenarios, console) for side, checkout in checkouts.items()}
    table = Table(
        "scenario",
        "numbers",
        "files",
        "BASE and HEAD",
        title=f"{options.base} and {options.head or 'the working tree'}",
    )
    differences: list[str] = []
    for place, (name, commands) in enumerate(scenarios.items()):
        found = compare_directories(*(root / side / str(place) for side in commits))
        found.differences[:0] = differing_statuses(commands, *(statuses[side][name] for side in commits))
        equal = "equal" if not found.differences else f"{len(found.differences)} differences"
        table.add_row(name, str(found.numbers), str(found.files), equal)
        differences += [f"{name}: {text}" for text in found.differences[:SHOWN]]
    console.print(table)
    for text in differences:
        console.print(text, markup=False, soft_wrap=True)
    if differences:
        console.print(f"everything is in {root}", markup=False, soft_wrap=True)
        return 1
    shutil.rmtree(root)
    return 0


def differing_statuses(commands: Sequence[Command], base: Sequence[int], head: Sequence[int]) -> list[str]:
    """The commands that did not end on both sides as they must; equal failures are differences, too."""
    return [
        f"{command.tool} (command {number}): exit status {a} in BASE, {b} in HEAD, expected {command.status}"
        for number, (command, a, b) in enumerate(zip(commands, base, head, strict=True), start=1)
        if {a, b} != {command.status}
    ]


def check_out(commit: str | None, directory: Path) -> Path:
    """Writes a commit's files, or the working tree's, to `directory`; checks that megadpo is imported from there."""
    directory.mkdir(parents=True)
    if commit is None:
        listing = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
        for name in filter(lambda name: (ROOT / name).is_file(), os.fsdecode(listing).split("\0")):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    else:
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit).stdout)) as files:
            files.extractall(directory, filter="data")
    asked = [sys.executable, "-c", "import megadpo; print(megadpo.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    told = subprocess.run(asked, cwd=directory.parent, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    if Path(told.stdout.strip()) != directory / "megadpo" / "__init__.py":
        raise SystemExit(f"megadpo is imported from {told.stdout.strip()}, it must come from {directory}")
    return directory


def git(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Runs git in this repository; its output."""
    return subprocess.run(["git", "-C", str(ROOT), *words], stdout=subprocess.PIPE, check=check)


def write_inputs(directory: Path) -> None:
    """Writes two models with one vocabulary, and pairs, for both sides."""
    from tests.helpers.pairs import make_pairs  # these take seconds to import, which comparing does without
    from tests.helpers.tiny_models import write_tiny_model

    write_tiny_model(directory / "model", "qwen2", tied=True)
    write_tiny_model(directory / "other", "qwen2", tied=True, seed=7)
    lines = [json.dumps(pair) + "\n" for pair in make_pairs(15, seed=11)]
    (directory / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")


def run_all(
    side: str, checkout: Path, root: Path, scenarios: Mapping[str, Sequence[Command]], console: Console
) -> dict[str, list[int]]:
    """Runs the scenarios with the tools of a checkout, each in ROOT/SIDE/ITS PLACE; the exit statuses by name."""
    work = root / "work"
    statuses: dict[str, list[int]] = {}
    for place, (name, commands) in enumerate(scenarios.items()):
        (work / str(place)).mkdir(parents=True)
        statuses[name] = []
        for command in commands:
            started = time.perf_counter()
            status, output = run_command(command, checkout, work / str(place))
            statuses[name].append(status)
            seconds = time.perf_counter() - started
            ended = f"exit status {status} after {seconds:.0f} s"
            console.print(f"{side}: {name}: {command.tool}: {ended}", markup=False, soft_wrap=True)
            if status != command.status:
                console.print(output[-3000:], markup=False, soft_wrap=True)
    work.rename(root / side)
    return statuses


def run_command(command: Command, checkout: Path, directory: Path) -> tuple[int, str]:
    """Runs a command in `directory`; its exit status, and what it has printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(command.ranks)]
    result = subprocess.run(
        [
            *(sys.executable, *(launcher if command.ranks else [])),
            *(str(checkout / "tools" / f"{command.tool}.py"), *command.words.split()),
        ],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
