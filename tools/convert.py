#!/usr/bin/env python3
"""Converts models between Hugging Face directories and Megatron checkpoints that stand alone.

    python tools/convert.py import --hf DIR --out DIR [--dtype bf16]
    python tools/convert.py export --checkpoint DIR --out DIR [--dtype bf16]
    python tools/convert.py verify --hf DIR --checkpoint DIR [--pairs FILE]

Under `torchrun --nproc-per-node N` each process does 1/N of the work. An imported checkpoint is trained and scored
from, at any layout, with model.checkpoint=DIR. --checkpoint takes a checkpoint, or a run (the one that `latest` names).
Exit status: 0 done or equal, 2 refused, 3 different (verify); torchrun itself gives 0 or 1: zero or not is all it says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, whatever is installed

from megadpo.checkpoint.directory import find_checkpoint
from megadpo.commands.command_line import run_tool
from megadpo.config.choices import DeviceKind, Dtype
from megadpo.errors import ConfigError

DIFFERENT = 3
MAX_PAIRS = 16


def main(arguments: Sequence[str]) -> int:
    """Runs the conversion that the command line describes; returns the exit status."""
    options = _parser().parse_args(arguments)
    commands = {"import": _import, "export": _export, "verify": _verify}
    return run_tool("convert", lambda logger: commands[options.command](options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Hugging Face directory -> checkpoint")
    exporting = commands.add_parser("export", help="checkpoint -> Hugging Face directory")
    verifying = commands.add_parser("verify", help="compare every weight and side file, and log-probs on request")
    for command in (importing, verifying):
        command.add_argument(
            "--hf", type=Path, required=True, help="directory with config.json, tokenizer, safetensors"
        )
    for command in (exporting, verifying):
        command.add_argument("--checkpoint", type=Path, required=True, help="directory of a checkpoint or a run")
    for command in (importing, exporting):
        command.add_argument("--out", type=Path, required=True, help="directory to make; must not hold anything yet")
        command.add_argument(
            "--dtype", type=Dtype, choices=list(Dtype), help="format of the weights; default: as it is"
        )
    verifying.add_argument("--pairs", type=Path, help="preference file: compare log-probs with transformers' model too")
    verifying.add_argument(
        "--max-pairs", type=int, help=f"rows of that file to compare, from its start; default: {MAX_PAIRS}"
    )
    for command in (importing, exporting, verifying):
        command.add_argument(
            "--device",
            choices=[str(k) for k in DeviceKind],
            default="auto",
            help="of the processes' groups, and of the model that --pairs needs",
        )
    return parser


# Megatron takes seconds to import; mistakes above the imports cost none


def _import(options: argparse.Namespace) -> int:
    out = _fresh(options.out)
    from megadpo.commands.convert import import_model

    import_model(options.hf, out, dtype=options.dtype, device_kind=options.device)
    return 0


def _export(options: argparse.Namespace) -> int:
    checkpoint, out = find_checkpoint(options.checkpoint), _fresh(options.out)
    from megadpo.commands.convert import export_checkpoint

    export_checkpoint(checkpoint, out, dtype=options.dtype, device_kind=options.device)
    return 0


def _verify(options: argparse.Namespace) -> int:
    checkpoint = find_checkpoint(options.checkpoint)
    max_pairs = MAX_PAIRS if options.max_pairs is None else options.max_pairs
    if max_pairs < 1:
        raise ConfigError(
            f"--max-pairs={max_pairs}: must be 1 or more: raise it, or drop --pairs to compare weights only"
        )
    if options.max_pairs is not None and options.pairs is None:
        raise ConfigError(f"--max-pairs={max_pairs}: has no effect without --pairs: give --pairs=FILE, or drop it")
    from megadpo.commands.verify import verify

    equal = verify(options.hf, checkpoint, pairs_file=options.pairs, max_pairs=max_pairs, device_kind=options.device)
    return 0 if equal else DIFFERENT


def _fresh(out: Path) -> Path:
    """Returns `out` as an absolute path; raises ConfigError if it has content."""
    out = out.resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out={out}: must not exist, or be an empty directory: name another, or remove it")
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
