"""What the ranks of a conversion or scoring test do; module-level functions that `launch` can send."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from megadpo.checkpoint_files import find_checkpoint
from megadpo.config.compose import compose_config
from megadpo.config.schema import Dtype
from megadpo.convert import export_checkpoint, import_model
from megadpo.errors import MegaDPOError
from megadpo.score_files import ScoreWriter
from megadpo.scoring import run_scoring
from megadpo.verification import verify
from tests.helpers.fault_jobs import captured_log
from tests.helpers.no_room import largest_file


def import_hf(hf_dir: Path, out: Path, dtype: str | None = None) -> None:
    """`convert.py import` on this rank."""
    import_model(hf_dir, out, dtype=dtype and Dtype(dtype), device_kind="cpu")


def import_hf_without_room(hf_dir: Path, out: Path) -> None:
    """`import_hf` where no file may grow beyond 64 KiB."""
    with largest_file(2**16):
        import_hf(hf_dir, out)


def export_hf(checkpoint: Path, out: Path) -> None:
    """`convert.py export` on this rank."""
    export_checkpoint(find_checkpoint(checkpoint), out, dtype=None, device_kind="cpu")


def compare(hf_dir: Path, checkpoint: Path, pairs: Path | None = None) -> tuple[bool, str]:
    """`convert.py verify` on this rank: whether all is equal, and what was printed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        equal = verify(hf_dir, find_checkpoint(checkpoint), pairs_file=pairs, max_pairs=3, device_kind="cpu")
    return equal, printed.getvalue()


def score_pairs(words: list[str], output: Path) -> str:
    """`score.py` on this rank; what was logged."""
    with captured_log() as log:
        run_scoring(compose_config(words), output)
    return "\n".join(log)


def score_where_nothing_can_be_written(words: list[str], output: Path) -> str:
    """The message that ends a `score_pairs` whose lines find no place."""
    with mock.patch.object(ScoreWriter, "__init__", side_effect=MegaDPOError("no place for lines")):
        try:
            return score_pairs(words, output)
        except MegaDPOError as error:
            return str(error)


def score_and_die(words: list[str], output: Path, groups: int) -> None:
    """`score_pairs` that is killed in the middle of writing a line, after so many groups."""
    write, written = ScoreWriter.write, 0

    def torn(writer: ScoreWriter, lines: Sequence[Mapping[str, Any]]) -> None:
        nonlocal written
        write(writer, lines if written < groups else lines[:1])
        written += 1
        if written > groups:
            raise SystemError("killed")

    with mock.patch.object(ScoreWriter, "write", torn):
        score_pairs(words, output)
