"""Data paths: a file, a saved dataset, or a dataset of the Hugging Face Hub; parsing and checking their text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

HUB_PREFIX = "hf://"
FORMS = "FILE.jsonl, .json, .parquet or .csv, DIR[:SPLIT] of a saved dataset, or hf://OWNER/NAME[/CONFIG]:SPLIT"

_ABSENT = "must be an existing file: check the path; relative ones start from the working directory"
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"}


class SourceKind(str, Enum):
    """Kinds of sources; those of files are their suffixes."""

    json = ".json"
    jsonl = ".jsonl"
    parquet = ".parquet"
    csv = ".csv"
    saved = "saved dataset"
    hub = "hub dataset"


_SUFFIXES = {kind.value: kind for kind in SourceKind if kind.value.startswith(".")}


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """The parts of a data path; `path` is a file, a directory, or OWNER/NAME on the Hub."""

    kind: SourceKind
    path: str
    split: str | None = None
    subset: str | None = None
    """the Hub's name of a configuration of the dataset"""


def parse_source(text: str) -> SourceSpec:
    """Parses a data path. Raises ValueError with the requirement, without the path itself."""
    if text.startswith(HUB_PREFIX):
        return _parse_hub(text.removeprefix(HUB_PREFIX))
    directory, colon, split = text.rpartition(":")
    if Path(text).is_dir():
        return SourceSpec(SourceKind.saved, text)
    if colon and Path(directory).is_dir():
        return SourceSpec(SourceKind.saved, directory, split or None)
    suffix = Path(text).suffix
    if suffix in _SUFFIXES:
        return SourceSpec(_SUFFIXES[suffix], text)
    if suffix in _COMPRESSED and Path(text).is_file():
        raise ValueError(f"the suffix {suffix!r} is not read: unpack the file first")
    if Path(text).is_file():
        raise ValueError(f"the suffix {suffix!r} is not known: must be {FORMS}")
    raise ValueError(f"{_ABSENT}; a data path is {FORMS}")


def check_source(text: str) -> str | None:
    """The problem of a data path with its remedy, or None; reads no rows and uses no network."""
    try:
        spec = parse_source(text)
    except ValueError as problem:
        return str(problem)
    if spec.kind == SourceKind.hub:
        return None
    if spec.kind == SourceKind.saved:
        return _check_saved(Path(spec.path), spec.split)
    if not Path(spec.path).is_file():
        return _ABSENT
    return None


def _parse_hub(text: str) -> SourceSpec:
    name, _, split = text.partition(":")
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError("must be hf://OWNER/NAME:SPLIT or hf://OWNER/NAME/CONFIG:SPLIT, as in hf://OWNER/NAME:train")
    return SourceSpec(SourceKind.hub, "/".join(parts[:2]), split or None, parts[2] if len(parts) == 3 else None)


def _check_saved(directory: Path, split: str | None) -> str | None:
    index = directory / "dataset_dict.json"
    if index.is_file():
        try:
            splits = list(json.loads(index.read_text(encoding="utf-8"))["splits"])
        except (OSError, ValueError, KeyError, TypeError):
            return "has a dataset_dict.json that cannot be read: save the dataset again with save_to_disk"
        if split not in splits:
            said = "must name a split" if split is None else f"has no split {split!r}"
            return f"{said}; the dataset has {', '.join(splits)}: write {directory}:{splits[0] if splits else 'SPLIT'}"
        return None
    if not (directory / "state.json").is_file():
        return f"is a directory, but no dataset saved with save_to_disk: must be {FORMS}"
    if split is not None:
        return f"names the split {split!r} of a dataset that has none: write {directory}"
    return None
