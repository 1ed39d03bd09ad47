"""Rules of the group data: sources that must exist, names and fields that must differ."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from megadpo.config.schema import Config, show
from megadpo.data.source_spec import check_source

_SET_NAME = re.compile(r"[\w.-]+")


def check_data(config: Config, *, planning: bool) -> list[str]:
    """Violations of the keys about data; a plan needs none."""
    data = config.data
    violations = []
    if not data.train_path and not planning:
        violations.append("data.train_path=[]: must name at least one file, as in data.train_path=pairs.jsonl")
    if data.validation_path == {}:
        violations.append("data.validation_path={}: must name at least one file, or be null for no validation")
    for name in data.validation_files() if isinstance(data.validation_path, dict) else ():
        if not _SET_NAME.fullmatch(name):
            violations.append(
                f"data.validation_path={show(data.validation_path)}: the name {name!r} must be made of letters, "
                "digits, '_', '-' and '.', as it becomes part of metrics' names: choose another name"
            )
    named = [("data.train_path", path) for path in data.train_path]
    named += [("data.validation_path", path) for path in data.validation_files().values()]
    for key, path in named:
        problem = check_source(path)
        if problem is not None:
            remedy = demo_remedy(path)
            violations.append(f"{key}={path}: {f'must be an existing file: {remedy}' if remedy else problem}")
    if data.validation_path is not None and data.validation_fraction:
        violations.append(
            f"data.validation_fraction={show(data.validation_fraction)}: must be 0 when data.validation_path is given: "
            "drop one of the two"
        )
    if data.template_date is not None and not _is_date(data.template_date):
        violations.append(
            f"data.template_date={data.template_date}: must be a day, as in data.template_date=2025-01-31"
        )
    keys = [data.prompt_key, data.chosen_key, data.rejected_key]
    if len(set(keys)) < len(keys):
        violations.append(
            f"data.prompt_key={keys[0]}, data.chosen_key={keys[1]}, data.rejected_key={keys[2]}: must be three "
            "different fields: name the ones your records have"
        )
    return violations


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def demo_remedy(path: str) -> str:
    """The command that creates one of the demo's files, in words; empty for other paths."""
    if Path(path).parts[:2] != ("outputs", "demo"):
        return ""
    return "make the demo's files first: python tools/make_demo.py prepare (or the whole run: make demo)"
