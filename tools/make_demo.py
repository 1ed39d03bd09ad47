#!/usr/bin/env python
"""The demonstration: a tiny model and preference pairs made here, DPO on four CPU ranks, and what it changed.

    python tools/make_demo.py run        prepare, train and report, one after the other
    python tools/make_demo.py prepare    outputs/demo/model and outputs/demo/data; no network
    python tools/make_demo.py train      the real command, tensor parallel 2 × pipeline parallel 2, to outputs/demo/run
    python tools/make_demo.py report     before and after, on held-out pairs, with plain transformers; the run's curves

`train` and `run` pass further arguments on to tools/train.py, e.g. `train loss.beta=0.1 parallel.pipeline=1`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from demo import corpus
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from demo.measure import Measured, Rewards

TRAIN = Path(__file__).resolve().with_name("train.py")
ROOT = Path("outputs") / "demo"  # of the working directory, as conf/ has it
RANKS = 4
TRAIN_PAIRS, HELD_OUT_PAIRS = 640, 64
SHOWN_PROMPTS = 2
HIGHEST_BEFORE, LOWEST_AFTER = 0.75, 0.9

console = Console()


def prepare(
    root: Path, *, pretrain_steps: int = 160, train_pairs: int = TRAIN_PAIRS, held_out: int = HELD_OUT_PAIRS
) -> None:
    """Writes root/data/{train,heldout}.jsonl and root/model, the same on every call; replaces existing ones."""
    shutil.rmtree(root, ignore_errors=True)
    try:
        root.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"{shown(root)} can't be made ({error.strerror}): run from a directory that can be written to")
    corpus.write_jsonl(root / "data" / "train.jsonl", corpus.make_pairs(train_pairs, seed=10, held_out=False))
    corpus.write_jsonl(root / "data" / "heldout.jsonl", corpus.make_pairs(held_out, seed=11, held_out=True))
    console.print(f"{train_pairs} training pairs and {held_out} held-out pairs in {shown(root / 'data')}")
    console.print("loading torch and transformers …")
    # Imported here, since they take seconds: `train` does not need them, and other commands print a line before
    from demo import pretrain

    tokenizer = pretrain.build_tokenizer()
    model = pretrain.build_model(tokenizer, seed=1)
    pretrain.pretrain(model, tokenizer, steps=pretrain_steps, prompts_per_step=16, lr=2e-3, seed=1)
    pretrain.save(model, tokenizer, root / "model")
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, fp32, in {shown(root / 'model')}")


def train_command(overrides: Sequence[str]) -> list[str]:
    """The command that trains the demo model with torchrun on RANKS processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [*launcher, str(TRAIN), "+model=demo", "+experiment=demo", *overrides]


def train(root: Path, overrides: Sequence[str]) -> None:
    """Runs DPO on RANKS ranks and waits for it; an earlier run directory is removed first. Exits if training fails."""
    require(root / "model", "prepare")
    shutil.rmtree(root / "run", ignore_errors=True)
    command = train_command(overrides)
    console.print(
        f"$ torchrun --standalone --nproc-per-node {RANKS} {' '.join([shown(TRAIN), *command[7:]])}",
        highlight=False,
        soft_wrap=True,
    )
    # torchrun would set the same, with a warning.
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if result.returncode:
        sys.exit(f"training failed with exit status {result.returncode}; its messages are above")


def report(root: Path) -> None:
    """Prints the before/after table of the held-out pairs; exits with status 1 if the demonstration fell short."""
    require(root / "model", "prepare")
    require(root / "run" / "hf", "train")
    from demo import measure
    from inspection.curves import draw_curves

    beta = float(yaml.safe_load((root / "run" / "config.yaml").read_text(encoding="utf-8"))["loss"]["beta"])
    pairs = corpus.read_jsonl(root / "data" / "heldout.jsonl")
    with console.status("measuring the starting model …"):
        before = measure.measure(root / "model", pairs)
    with console.status("measuring the trained model …"):
        after = measure.measure(root / "run" / "hf", pairs)
    console.print(results_table(before, after, measure.rewards(after.logps, before.logps, beta=beta), beta=beta))
    for pair, old, new in list(zip(pairs, before.answers, after.answers, strict=False))[:SHOWN_PROMPTS]:
        console.print(f"[bold]{pair['prompt'][0]['content']}[/bold]\n  before: {old}\n  after:  {new}", highlight=False)
    run = root / "run"
    draw_curves(run / "metrics.jsonl", root / "curves.png", title=f"make demo: {RANKS} CPU ranks, β = {beta:g}")
    places = (("run directory", run), ("metrics", run / "metrics.jsonl"), ("curves", root / "curves.png"))
    for name, path in (*places, ("TensorBoard", run / "tensorboard"), ("exported model", run / "hf")):
        console.print(f"{name:>15}: {shown(path)}", highlight=False)
    shortfalls = find_shortfalls(before.logps.accuracy, after.logps.accuracy)
    if shortfalls:
        sys.exit("\n".join(shortfalls))


def results_table(before: Measured, after: Measured, rewards: Rewards, *, beta: float) -> Table:
    """The before/after table."""
    table = Table(title=f"{len(before.logps.chosen)} held-out pairs: courteous answers preferred to curt ones")
    table.add_column("measured with transformers, one sequence at a time")
    table.add_column("before", justify="right")
    table.add_column("after DPO", justify="right")
    accuracy = f"{before.logps.accuracy:.1%}", f"{after.logps.accuracy:.1%}"
    table.add_row("the model finds the preferred answer likelier", *accuracy)
    table.add_row("reward accuracy", "—", f"{rewards.accuracy:.1%}")
    table.add_row(f"mean reward margin (β = {beta:g})", "0", f"{rewards.margin:+.3f}")
    of = len(before.answers)
    table.add_row("own answers that are courteous and right", f"{before.courteous}/{of}", f"{after.courteous}/{of}")
    return table


def find_shortfalls(before: float, after: float) -> list[str]:
    """Reasons why two held-out accuracies do not show that DPO taught the preference; [] if they do."""
    found = []
    if not before <= HIGHEST_BEFORE:
        found.append(f"accuracy before is {before:.3f}, above {HIGHEST_BEFORE}: the starting model knew the preference")
    if not after >= LOWEST_AFTER:
        found.append(f"accuracy after is {after:.3f}, below {LOWEST_AFTER}: the preference was not learnt")
    return found


def require(path: Path, command: str) -> None:
    """Exits with the remedy if a path that an earlier phase writes is missing."""
    if not path.exists():
        sys.exit(f"{shown(path)} is missing: run `python {shown(Path(__file__))} {command}` first")


def shown(path: Path) -> str:
    """A path as the user would type it."""
    return os.path.relpath(path)


def run(root: Path, overrides: Sequence[str]) -> None:
    """Runs all phases, and prints the seconds of each."""
    phases = (
        ("prepare", lambda: prepare(root)),
        ("train", lambda: train(root, overrides)),
        ("report", lambda: report(root)),
    )
    seconds = []
    for number, (name, phase) in enumerate(phases, 1):
        console.rule(f"{number}/{len(phases)} {name}")
        start = time.perf_counter()
        phase()
        seconds.append(f"{name} {time.perf_counter() - start:.0f} s")
    console.rule(", ".join(seconds))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    for name in ("run", "prepare", "train", "report"):
        phase = phases.add_parser(name)
        if name in ("run", "train"):
            phase.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to tools/train.py")
    options = parser.parse_args(arguments)
    # Read when torch and transformers are imported. One thread gives the same sums on any number of cores, and is not
    # slower for a model this small.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")
    if options.phase == "prepare":
        prepare(ROOT)
    elif options.phase == "train":
        train(ROOT, options.overrides)
    elif options.phase == "report":
        report(ROOT)
    else:
        run(ROOT, options.overrides)


if __name__ == "__main__":
    main()
