"""The files of a scoring: those it writes while it runs, those it leaves, and those a killed one resumes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from megadpo.errors import ConfigError, MegaDPOError, listing
from megadpo.runtime.files import Appender, write_durably, writing

# Written at a time where nothing is computed in between.
_LINES_AT_ONCE = 10_000


class Role(str, Enum):
    """The model that scores in a pass over the pairs, and the name of its file while the scoring runs."""

    policy = "scores"
    reference = "reference"


@dataclass(frozen=True, slots=True)
class ScoreFiles:
    """OUT.jsonl, OUT.summary.json, and OUT.jsonl.partial/ while the scoring runs. Methods are for one process."""

    output: Path

    @property
    def partial(self) -> Path:
        """Directory of an unfinished scoring."""
        return self.output.with_name(f"{self.output.name}.partial")

    def scores(self, role: Role) -> Path:
        """The lines of a pass so far."""
        return self.partial / f"{role.value}.jsonl"

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
            return _object(self.read_summary().get("identity", {}), self.summary)
        return _read(self._identity) if self._identity.is_file() else {}

    def begin(
        self, identity: Mapping[str, Any], roles: Sequence[Role], *, pairs: int, group_size: int
    ) -> dict[Role, int] | None:
        """The number of pairs that have lines already, by pass; None where all is finished.

        Unless a pass has the lines of all `pairs`, those beyond its last whole group of `group_size` are cut off, torn
        ones with them, so that the groups that follow are those of an uninterrupted scoring. MegaDPOError for scores of
        another identity.
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
            if not known:  # of what the lines are that may be there, nobody knows
                for role in roles:
                    self.scores(role).unlink(missing_ok=True)
            write_durably(self._identity, json.dumps(identity, indent=1))
            return {role: _cut_to_groups(self.scores(role), pairs, group_size) for role in roles}

    def _check_identity(self, known: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        different = list(_differences(known, identity))
        if not different:
            return
        there = self.output if self.output.exists() else self.partial
        raise MegaDPOError(
            f"{there} holds scores of another model or other data: remove it, or give another output. What differs:\n"
            f"{listing(different)}"
        )

    def join(self, line_of_both: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]) -> Path:
        """Writes the line that `line_of_both` makes of each pair's two; returns the file. Both passes are complete."""
        joined = self.partial / "joined.jsonl"
        joined.unlink(missing_ok=True)  # of a start that ended here
        lines = (line_of_both(policy, reference) for policy, reference in self._both())
        with ScoreWriter(joined) as writer:
            while some := list(islice(lines, _LINES_AT_ONCE)):
                writer.write(some)
        return joined

    def _both(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        passes = (self.read(self.scores(role)) for role in (Role.policy, Role.reference))
        for number, (policy, reference) in enumerate(zip(*passes, strict=True), 1):
            if policy["index"] != reference["index"]:
                raise MegaDPOError(
                    f"{self.scores(Role.reference)}:{number}: is of pair {reference['index']}, the policy's line of "
                    f"{policy['index']}: remove {self.partial} to start anew"
                )
            yield policy, reference

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """The lines of a file as objects."""
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield _object(json.loads(line), path)
                except ValueError as error:
                    there = path if path == self.output else self.partial
                    raise MegaDPOError(
                        f"{path}:{number}: can't be read ({error}): remove {there} to start anew"
                    ) from error

    def finish(self, summary: Mapping[str, Any], lines: Path) -> None:
        """Writes the summary and gives the file of lines its name: from then on the scoring is complete."""
        self.write_summary(summary)
        with writing(self.output):
            lines.rename(self.output)
        # Other ranks have the tokens mapped: some network file systems keep names of such files until they let go.
        shutil.rmtree(self.partial, ignore_errors=True)

    def read_summary(self) -> dict[str, Any]:
        """The summary that `write_summary` has written."""
        return _read(self.summary)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces the summary."""
        write_durably(self.summary, json.dumps(summary, indent=1) + "\n")


class ScoreWriter:
    """Appends lines, on disk before the next group is scored; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = Appender(path)

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds one line for each object."""
        try:
            self._file.append("".join(json.dumps(line) + "\n" for line in lines).encode())
        except OSError as error:
            raise MegaDPOError(f"{self._path}: {error.strerror}: make room and start again; it goes on here") from error


def _differences(known: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line for each leaf of two nested mappings that differs."""
    for name in sorted({*known, *now}):
        before, after = known.get(name), now.get(name)
        if before != after and all(side is None or isinstance(side, Mapping) for side in (before, after)):
            yield from _differences(before or {}, after or {}, f"{prefix}{name}: ")
        elif before != after:
            yield f"{prefix}{name}: {before} then, {after} now"


def _cut_to_groups(path: Path, pairs: int, group_size: int) -> int:
    """Cuts a file of at most `pairs` lines to whole groups, the last of which may be smaller; the lines left."""
    path.touch()
    kept, kept_end, end = 0, 0, 0
    with path.open("r+b") as file:
        for count, line in enumerate(islice(file, pairs), 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            if count % group_size == 0 or count == pairs:
                kept, kept_end = count, end
        file.truncate(kept_end)
    return kept


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
