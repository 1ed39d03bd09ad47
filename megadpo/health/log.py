"""Logs hints at an unhealthy run when they begin and end, and stores them in health.json. For one rank.

Like a tracker it never stops a run: errors become warnings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megadpo.errors import MegaDPOError
from megadpo.health.hints import Change, Health, Hint
from megadpo.health.history import RunFacts
from megadpo.metrics.trackers import lines_up_to
from megadpo.runtime.files import write_durably
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)


class HealthLog:
    """The health of a run that continues from `resume_step` (0: a fresh start).

    Earlier hints are restored from metrics.jsonl and not logged again. Without that file, or with `anew` (if earlier
    lines can't be compared with later ones), only the hints in health.json are known. `locate_row` maps a row of the
    data to its location in words.
    """

    def __init__(
        self,
        run_dir: Path,
        facts: RunFacts,
        *,
        resume_step: int,
        anew: bool = False,
        locate_row: Callable[[int], str] = "row {}".format,
    ) -> None:
        self._path = run_dir / "health.json"
        self._locate_row = locate_row
        self._reported: set[str] = set()
        self.health = Health(facts, begun_after=resume_step)
        if resume_step:
            try:
                self.health = _health_before(run_dir, facts, resume_step, anew=anew)
            except Exception as error:
                logger.warning(
                    "health: what came before step %d can't be read (%r): it is not judged", resume_step, error
                )
        self._write()

    def observe(self, step: int, metrics: Mapping[str, float], rows: Sequence[int]) -> None:
        """Observes a logged line, with the rows of its largest gradient norm; logs and stores the changes."""
        try:
            changes = self.health.observe(step, metrics, rows)
            for change in changes:
                self._log_change(change, step)
        except Exception as error:
            self._warn(f"health: step {{}} can't be judged ({error!r}; the run goes on)", step)
            return
        if changes:
            self._write()

    def finish(self) -> str:
        """Logs and stores the verdict, and returns it."""
        try:
            verdict = self.health.verdict
        except Exception as error:
            self._warn(f"health: there is no verdict at the end ({error!r})")
            return "not judged"
        self._write()
        more = f"; see {self._path} and docs/health.md" if self.health.hints else ""
        logger.info("health: %s%s", verdict, more)
        return verdict

    def _log_change(self, change: Change, step: int) -> None:
        hint = change.hint
        if not change.begins:
            logger.info("health: %s has ended: it held last at step %d, now is %d", hint.name, hint.last_step, step)
        elif hint.note:
            logger.info("%s", self._text(hint))
        else:
            logger.warning("%s", self._text(hint))

    def _text(self, hint: Hint) -> str:
        rows = f". Its pairs: {', '.join(map(self._locate_row, hint.rows))}" if hint.rows else ""
        return f"health: {hint.name} at step {hint.first_step}: {hint.message}{rows}. {hint.advice} (docs/health.md)"

    def _warn(self, text: str, step: int = 0) -> None:
        """Logs each text once, whatever its step."""
        if text not in self._reported:
            self._reported.add(text)
            logger.warning("%s", text.replace("{}", str(step)))

    def _write(self) -> None:
        try:
            write_durably(self._path, json.dumps(self.health.report(), indent=1) + "\n")
        except MegaDPOError as error:
            self._warn(f"{error} (the run goes on; hints are in this log)")
        except Exception as error:
            self._warn(f"{self._path}: can't be written ({error!r}; the run goes on; hints are in this log)")


def _health_before(run_dir: Path, facts: RunFacts, resume_step: int, *, anew: bool) -> Health:
    """Restores a run's health at `resume_step` from its files."""
    metrics, path = run_dir / "metrics.jsonl", run_dir / "health.json"
    known = path.is_file()
    # Information that metrics.jsonl lacks: the run's first step, and the rows of its hints.
    report: dict[str, Any] = {"begun_after": 0, "hints": []}
    if known:
        report |= json.loads(path.read_text(encoding="utf-8"))
    told = [Hint(**hint) for hint in report["hints"] if hint["first_step"] <= resume_step]
    # Earlier lines are of other data or another loss.
    lines = [line for line in _training_lines(metrics, resume_step) if line[0] > report["begun_after"]]
    if anew or not lines:
        return Health(facts, begun_after=resume_step, hints=told)
    begun_after = report["begun_after"]
    if not known and len(lines) > 1:
        # The first line has as many updates as the next one; updates before those have not been observed.
        begun_after = max(0, 2 * lines[0][0] - lines[1][0])
    # Hints before `begun_after` can't be derived from the lines.
    health = Health(facts, begun_after=begun_after, hints=[hint for hint in told if hint.first_step <= begun_after])
    rows = {(hint.name, hint.first_step): hint.rows for hint in told}
    for step, line in lines:
        for change in health.observe(step, line):
            change.hint.rows = rows.get((change.hint.name, change.hint.first_step), ())
    health.steps_done = resume_step
    return health


def _training_lines(path: Path, last_step: int) -> list[tuple[int, dict[str, Any]]]:
    """Steps and metrics of the training lines of a metrics file up to a step; [] where it can't be read."""
    if not path.is_file():
        return []
    try:
        found = [(line["step"], line) for _, line in lines_up_to(path, last_step)]
        return [(step, line) for step, line in found if "lr" in line]  # those of skipped updates included
    except (OSError, ValueError, TypeError) as error:
        logger.warning("health: what came before step %d can't be read (%r): it is not judged", last_step, error)
        return []
