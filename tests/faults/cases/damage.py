"""Ways in which a checkpoint comes to harm on disk, each with what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadpo.checkpoint.manifest import MANIFEST, write_manifest

SHARD = "__0_0.distcp"
_OTHER_BYTES = "holds other bytes than were written"
_OTHER_SIZE_OR_BYTES = rf"(has \d+ bytes, \d+ were written|{_OTHER_BYTES})"


@dataclass(frozen=True)
class Damage:
    """`make(CHECKPOINT, OTHER)` harms a checkpoint, with files of another of the run; `says` is what is told of it."""

    name: str
    make: Callable[[Path, Path], object]
    says: str


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _zero_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _of_another_version(checkpoint: Path, _: Path) -> None:
    """A checkpoint that is whole, of a program that described a run in fewer words."""
    _edit(checkpoint / "training.json", lambda fields: fields.pop("metrics"))
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, {})


DAMAGES = [
    Damage("flipped bit", lambda own, other: _flip(own / SHARD), f"{SHARD} {_OTHER_BYTES}"),
    Damage("flipped bit of rank 1", lambda own, other: _flip(own / "__1_0.distcp"), f"__1_0.distcp {_OTHER_BYTES}"),
    Damage("zeroed page", lambda own, other: _zero_page(own / SHARD), f"{SHARD} {_OTHER_BYTES}"),
    Damage("truncated", lambda own, other: _cut_off(own / SHARD), rf"{SHARD} has \d+ bytes, \d+ were written"),
    Damage("missing shard", lambda own, other: (own / SHARD).unlink(), f"{SHARD} is missing"),
    Damage("shard of another save", lambda own, other: shutil.copy(other / SHARD, own), f"{SHARD} {_OTHER_BYTES}"),
    Damage("missing metadata", lambda own, other: (own / ".metadata").unlink(), r"\.metadata is missing"),
    Damage("flipped metadata", lambda own, other: _flip(own / ".metadata"), rf"\.metadata {_OTHER_BYTES}"),
    Damage(
        "description of another save",
        lambda own, other: shutil.copy(other / "training.json", own),
        rf"training\.json {_OTHER_SIZE_OR_BYTES}",
    ),
    Damage("garbled description", lambda own, other: _flip(own / "training.json"), rf"training\.json {_OTHER_BYTES}"),
    Damage("missing description", lambda own, other: (own / "training.json").unlink(), r"training\.json is missing"),
    Damage("description of another version", _of_another_version, r"training\.json must hold step \(int\)"),
    Damage(
        "other config.json", lambda own, other: _flip(own / "hf" / "config.json"), rf"hf/config\.json {_OTHER_BYTES}"
    ),
    Damage(
        "missing manifest",
        lambda own, other: (own / MANIFEST).unlink(),
        r"manifest\.json is missing, so that nothing says what was written",
    ),
    Damage(
        "garbled manifest",
        lambda own, other: (own / MANIFEST).write_bytes(b'{"format": 1, "fi\xff'),
        r"manifest\.json can't be read \(UnicodeDecodeError",
    ),
    Damage(
        "manifest of another format",
        lambda own, other: _edit(own / MANIFEST, lambda fields: fields.update(format=0)),
        "it is of format 0, this version of megadpo reads format 1: use the version that wrote it",
    ),
    Damage("manifest of another save", lambda own, other: shutil.copy(other / MANIFEST, own), _OTHER_SIZE_OR_BYTES),
]
