"""Compares what two runs of one command have left behind: plain files, nothing is run."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# Files whose values are compared one by one: some may differ, or a difference is worth its name.
BY_VALUE = ("*.jsonl", "training.json", "manifest.json", "*.summary.json")
# Names of those that may.
UNSTABLE = (
    *("time/*", "throughput/*", "eval/time_s", "fp8/time_s", "memory/peak_gib"),  # metrics.jsonl
    "metrics/eval/time_s",  # training.json: what an evaluation had found
    *("files/*/sha256", "files/training.json/bytes"),  # manifest.json: the files are compared themselves
    *("seconds", "pairs_per_s", "identity/weights/*", "identity/reference/weights/*"),  # scores.summary.json
)
# torch gives every save an id, which stands in its .metadata.
_SAVE_ID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(slots=True)
class Comparison:
    """How many numbers and files were compared, and what differs, a line each."""

    numbers: int = 0
    files: int = 0
    differences: list[str] = field(default_factory=list)


def compare_directories(base: Path, head: Path) -> Comparison:
    """Compares all files under two directories, by value or by SHA-256; lines of numbers come first."""
    found = Comparison()
    sides = [_files_by_name(root) for root in (base, head)]
    for name in sorted(sides[0].keys() ^ sides[1].keys()):
        found.differences.append(f"{name}: only {'BASE' if name in sides[0] else 'HEAD'} has this file")
    for name in sorted(sides[0].keys() & sides[1].keys(), key=lambda name: (not name.endswith(".jsonl"), name)):
        found.files += 1
        if any(fnmatch(Path(name).name, pattern) for pattern in BY_VALUE):
            lines = [read_lines(files[name]) for files in sides]
            found.numbers += sum(_is_number(value) for line in lines[0] for value in line.values())
            found.differences += [f"{name}: {text}" for text in differing_values(*lines)]
        else:
            digests = [_sha256(files[name]) for files in sides]
            if digests[0] != digests[1]:
                found.differences.append(f"{name}: SHA-256 {digests[0][:16]} in BASE, {digests[1][:16]} in HEAD")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The stable values of each line of a JSONL file, or of the one object of a JSON file, by their paths in it."""
    texts = path.read_text(encoding="utf-8")
    lines = texts.splitlines() if path.suffix == ".jsonl" else [texts]
    flat = [_flatten(json.loads(line), "") for line in lines]
    return [{name: value for name, value in line.items() if is_stable(name)} for line in flat]


def differing_values(base: Sequence[Mapping[str, Any]], head: Sequence[Mapping[str, Any]]) -> list[str]:
    """The values that differ, with their step or index where they have one; 1 is not 1.0, and 0.0 is not -0.0."""
    found = [] if len(base) == len(head) else [f"{len(base)} lines in BASE, {len(head)} in HEAD"]
    for a, b in zip(base, head, strict=False):
        where = next((f"{key} {a[key]}: " for key in ("step", "index") if key in a), "")
        for name in sorted(a.keys() | b.keys()):
            values = [repr(side[name]) if name in side else "nothing" for side in (a, b)]
            if values[0] != values[1]:
                found.append(f"{where}{name}: {values[0]} in BASE, {values[1]} in HEAD")
    return found


def is_stable(name: str) -> bool:
    """Whether a value of this name must be the same at each run."""
    return not any(fnmatch(name, pattern) for pattern in UNSTABLE)


def _files_by_name(root: Path) -> dict[str, Path]:
    """Files under `root` by relative path; log-probs of a reference's cache, named by time and chance, are numbered."""
    files: dict[str, Path] = {}
    segments: Counter[Path] = Counter()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root)
        if name.suffix == ".logps":
            name = name.with_name(f"{segments[path.parent]}.logps")
            segments[path.parent] += 1
        files[name.as_posix()] = path
    return files


def _sha256(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(_SAVE_ID.sub(b"", content) if path.name == ".metadata" else content).hexdigest()


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    """The plain values in nested lists and mappings by their path; an empty one is a value itself."""
    if isinstance(value, list) and value:
        value = {str(place): item for place, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}/{key}" if prefix else key))
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
