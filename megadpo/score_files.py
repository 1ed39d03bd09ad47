"""The files of a scoring: what is written while it runs, what it leaves behind, and what it may go on from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megadpo.errors import ConfigError, MegaDPOError, listing
from megadpo.files import write_durably, writing


@dataclass(frozen=True, slots=True)
class ScoreFiles:
    """OUT.jsonl, OUT.summary.json, and OUT.jsonl.partial/ while the scoring runs. Methods are for one process."""

    output: Path

    @property
    def partial(self) -> Path:
        """Directory of an unfinished scoring."""
        return self.output.with_name(f"{self.output.name}.partial")

    @property
    def scores(self) -> Path:
        """The lines so far."""
        return self.partial / "scores.jsonl"

    @property
    def tokens(self) -> Path:
        """Tokenized pairs, unless data.cache_dir says where."""
        return self.partial / "tokens"

    @property
    def summary(self) -> Path:
        """Mean log-probs, counts, and the identity of model and data."""
        return self.output.with_name(f"{self.output.name.removesuffix('.jsonl')}.summary.json")

    @property
    def _identity(self) -> Path:
        return self.partial / "identity.json"

    def check_output(self) -> None:
        """Raises ConfigError where `output` is there and no scoring is known to have written it."""
        if self.output.is_dir():
            raise ConfigError(f"output={self.output}: must be a file to write, it is a directory: name one in it")
        if self.output.exists() and not self.summary.is_file():
            raise ConfigError(f"output={self.output}: the file is there already: remove it, or give another output")

    def known_identity(self) -> dict[str, Any]:
        """Identity of the scoring that is unfinished or finished here, {} where there is none."""
        if self.output.exists():
            return _object(_read(self.summary).get("identity", {}), self.summary)
        return _read(self._identity) if self._identity.is_file() else {}

    def begin(self, identity: Mapping[str, Any], group_size: int) -> int | None:
        """Number of pairs that have lines already, None where all is finished; raises for another identity.

        Lines beyond the last whole group of `group_size` are cut off, torn ones with them, so that the groups that
        follow are those of an uninterrupted scoring.
        """
        finished, known = self.output.exists(), self.known_identity()
        if finished:
            # Tokens of this start, or what a kill at the very end left behind.
            shutil.rmtree(self.partial, ignore_errors=True)
        if finished or known:
            self._check_identity(known, identity)
        if finished:
            return None
        with writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            write_durably(self._identity, json.dumps(identity, indent=1))
            return _cut_to_groups(self.scores, group_size)

    def _check_identity(self, known: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        different = list(_differences(known, identity))
        if not different:
            return
        there = self.output if self.output.exists() else self.partial
        raise MegaDPOError(
            f"{there} holds scores of another model or other data: remove it, or give another output. What differs:\n"
            f"{listing(different)}"
        )

    def read_scores(self) -> Iterator[dict[str, Any]]:
        """The lines so far as objects."""
        with self.scores.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield _object(json.loads(line), self.scores)
                except ValueError as error:
                    raise MegaDPOError(
                        f"{self.scores}:{number}: can't be read ({error}): remove {self.partial} to start anew"
                    ) from error

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary and gives the scores their name: from then on the scoring is complete."""
        write_durably(self.summary, json.dumps(summary, indent=1) + "\n")
        with writing(self.output):
            self.scores.rename(self.output)
        # Other ranks have the tokens mapped: some network file systems keep names of such files until they let go.
        shutil.rmtree(self.partial, ignore_errors=True)


class ScoreWriter:
    """Appends lines, on disk before the next group is scored; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            # Without a buffer, which would fail once more on closing, in another error's place.
            self._file = path.open("ab", buffering=0)

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds one line for each object."""
        rest = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise MegaDPOError(f"{self._path}: {error.strerror}: make room and start again; it goes on here") from error


def _differences(known: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line for each leaf of two nested mappings that differs."""
    for name in sorted({*known, *now}):
        before, after = known.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{name}: ")
        elif before != after:
            yield f"{prefix}{name}: {before} then, {after} now"


def _cut_to_groups(path: Path, group_size: int) -> int:
    """Cuts a file of lines to whole groups; the number of lines left."""
    path.touch()
    with path.open("r+b") as file:
        count, end, group_end = 0, 0, 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
            if count % group_size == 0:
                group_end = end
        file.truncate(group_end)
    return count - count % group_size


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return _object(content, path)


def _object(content: object, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__} where an object must be")
    return content


def _damaged(path: Path, reason: str) -> MegaDPOError:
    return MegaDPOError(f"{path} can't be read ({reason}): remove it, and what it belongs to, to start anew")
