"""The hints that a run has given so far, with their steps, by the rules of rules.py. Pure: no files, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megadpo.health.history import BLOCK_PAIRS, WINDOW, History, RunFacts, read_line
from megadpo.health.rules import RULES, Finding, Rule

_MOST_ROWS = 64


@dataclass(slots=True)
class Hint:
    """A rule that has held since `first_step`, `times` times so far, most recently at `last_step`.

    `message` and `evidence` are those of the first step, with `rows` if the rule is about one update. `ended_at` is the
    step at which it had not held for a whole window; None while it holds. If it holds again, the same hint continues,
    and ends only after twice as long without holding; `endings` counts that. A `note` may be intended by the user.
    """

    name: str
    first_step: int
    last_step: int
    message: str
    advice: str
    evidence: Mapping[str, float]
    rows: Sequence[int] = ()
    times: int = 1
    ended_at: int | None = None
    endings: int = 0
    note: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """A change caused by a line: a hint that begins or has ended."""

    hint: Hint
    begins: bool


@dataclass(slots=True)
class Health:
    """Hints of a run that is observed line by line, from the first line after step `begun_after`."""

    facts: RunFacts
    begun_after: int
    steps_done: int = field(init=False)
    skipped: int = field(init=False, default=0)
    hints: list[Hint] = field(default_factory=list)
    history: History = field(init=False)
    _quiet: dict[str, int] = field(init=False)  # for each active hint, the number of judgements since without holding

    def __post_init__(self) -> None:
        self.steps_done = self.begun_after
        self.history = History(whole=self.begun_after == 0)
        self._quiet = {hint.name: 0 for hint in self.hints if hint.ended_at is None}

    def observe(self, step: int, metrics: Mapping[str, float | None], rows: Sequence[int] = ()) -> list[Change]:
        """Observes a line of metrics, with the rows of its update with the largest gradient norm; returns the changes.

        Lines that are not of training, or not finite, change nothing; one whose updates were all skipped is left out.
        """
        self.skipped = int(metrics.get("steps/skipped") or self.skipped)
        line = read_line(step, metrics, updates=step - self.steps_done)
        if line is None:
            if "lr" in metrics and "loss" not in metrics:  # a line of skipped updates only
                self.steps_done = step
            return []
        self.steps_done = step
        completes_block = self.history.add(line)
        judged = (
            self._judge(rule, step, rows)
            for rule in RULES
            if (rule.every_line or completes_block) and (self.facts.has_preference or not rule.of_preference)
        )
        return [change for change in judged if change is not None]

    def _judge(self, rule: Rule, step: int, rows: Sequence[int]) -> Change | None:
        finding = rule.check(self.history, self.facts)
        hint = next((hint for hint in reversed(self.hints) if hint.name == rule.name), None)
        if hint is None or (rule.every_line and hint.ended_at is not None):
            return None if finding is None else self._begin(rule, finding, step, rows)
        if finding is not None:
            hint.last_step, hint.times, hint.ended_at = step, hint.times + 1, None
            self._quiet[rule.name] = 0
        elif hint.ended_at is None:
            self._quiet[rule.name] += 1
            if self._quiet[rule.name] >= rule.quiet * 2**hint.endings:
                hint.ended_at, hint.endings = step, hint.endings + 1
                return Change(hint, begins=False)
        return None

    def _begin(self, rule: Rule, finding: Finding, step: int, rows: Sequence[int]) -> Change:
        named = tuple(rows[:_MOST_ROWS]) if rule.every_line else ()
        hint = Hint(rule.name, step, step, finding.text, rule.advice, finding.evidence, named, note=rule.note)
        self.hints.append(hint)
        self._quiet[rule.name] = 0
        return Change(hint, begins=True)

    @property
    def verdict(self) -> str:
        """One line with the hints and their steps, or that there are none, or that the run is too short to judge."""
        seen = f"{self.history.updates} updates on {self.history.pairs:.0f} pairs"
        if self.begun_after:
            seen += f" since step {self.begun_after}"
        if self.skipped:
            seen += f" ({'1 step was' if self.skipped == 1 else f'{self.skipped} steps were'} skipped)"
        told, notes = (_summaries([hint for hint in self.hints if hint.note == note]) for note in (False, True))
        if told:
            counted = "1 hint" if len(told) == 1 else f"{len(told)} hints"
            return f"{counted} in {seen}: {', '.join([*told, *notes])}"
        noted = f"; to note: {', '.join(notes)}" if notes else ""
        if self.history.first is None:
            return (
                f"not judged: {seen} are too few, hints look at {WINDOW} blocks of {BLOCK_PAIRS} pairs or more{noted}"
            )
        return f"healthy: no hints in {seen}{noted}"

    def report(self) -> dict[str, Any]:
        """The content of health.json."""
        return {
            "verdict": self.verdict,
            "begun_after": self.begun_after,
            "updates": self.history.updates,
            "pairs": round(self.history.pairs),
            "hints": [asdict(hint) for hint in self.hints],
        }


def _summaries(hints: Sequence[Hint]) -> list[str]:
    """One text per hint name, with its steps, and the number of times that it began if more than one."""
    told = []
    for name in dict.fromkeys(hint.name for hint in hints):
        own = [hint for hint in hints if hint.name == name]
        first, last, often = own[0], own[-1], f"{len(own)} times, " if len(own) > 1 else ""
        if first.first_step == last.last_step:
            told.append(f"{name} (step {first.first_step})")
        elif last.ended_at is None and not (often or last.rows):
            told.append(f"{name} (since step {first.first_step})")
        else:
            told.append(f"{name} ({often}steps {first.first_step} to {last.last_step})")
    return told
