"""Finds model replicas that the others wait for: they are busy much longer before gradients can be exchanged."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# Minimum number of steps to judge: single steps differ by their pairs.
_STEPS = 10
# A slow replica is busy this many times as long as the others' median, both absolute and relative to its work. Replicas
# do not get equal work: of nine microbatches for eight replicas one computes two, and the same one in every step.
_SLOW = 1.5
# Minimum of the seconds per step that others wait, to be reported.
_WAIT_S = 0.1


@dataclass(frozen=True, slots=True)
class BusyTime:
    """A rank's time over some steps: seconds until its gradients were ready, of which `data_s` waiting for its data.

    `replica` is its data-parallel rank. The ranks of one replica wait for each other, so they are busy together, with
    the same work of `flops`.
    """

    replica: int
    seconds: float
    data_s: float
    flops: float


class StragglerWatch:
    """Sums the busy times of all ranks, and reports a slow replica once each time that it becomes slow."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds: dict[int, float] = defaultdict(float)
        self._data_s: dict[int, float] = defaultdict(float)
        self._flops: dict[int, float] = defaultdict(float)
        self._slow: set[int] = set()

    def observe(self, step: int, steps: int, busy: Sequence[BusyTime]) -> list[str]:
        """Adds all ranks' `busy` times of `steps` steps, the last of which is `step`; returns lines to log."""
        self._steps += steps
        for rank, own in enumerate(busy):
            self._seconds[rank] += own.seconds
            self._data_s[rank] += own.data_s
            self._flops[rank] += own.flops
        if self._steps < _STEPS:
            return []
        lines = self._judge(step, [own.replica for own in busy])
        self._steps = 0
        for sums in (self._seconds, self._data_s, self._flops):
            sums.clear()
        return lines

    def _judge(self, step: int, replicas: Sequence[int]) -> list[str]:
        ranks: dict[int, list[int]] = defaultdict(list)
        for rank, replica in enumerate(replicas):
            ranks[replica].append(rank)
        if len(ranks) == 1:
            return []
        per_step = {replica: max(self._seconds[r] for r in own) / self._steps for replica, own in ranks.items()}
        work = {replica: self._flops[own[0]] for replica, own in ranks.items()}
        rates = {replica: seconds / work[replica] for replica, seconds in per_step.items()}
        times, paces = sorted(per_step.values()), sorted(rates.values())
        lines = []
        for replica, seconds in per_step.items():
            others = _median_of_others(times, seconds)
            as_much = _median_of_others(paces, rates[replica]) * work[replica]
            slow = seconds > max(_SLOW * others, _SLOW * as_much, others + _WAIT_S)
            if slow and replica not in self._slow:
                lines.append(self._described(step, ranks[replica], seconds, others, as_much))
            elif not slow and replica in self._slow:
                lines.append(f"straggler: {_ranks(ranks[replica])} is as fast as the others again, at step {step}")
            (self._slow.add if slow else self._slow.discard)(replica)
        return lines

    def _described(self, step: int, ranks: Sequence[int], seconds: float, others: float, as_much: float) -> str:
        data_s = max(self._data_s[rank] for rank in ranks) / self._steps
        return (
            f"straggler: {_ranks(ranks)} was busy {seconds:.3g} s a step before gradients could be exchanged "
            f"({data_s:.3g} s of it waiting for data), the others {others:.3g} s and then wait; its work takes them "
            f"{as_much:.3g} s (steps {step - self._steps + 1} to {step}): look at its machine"
        )


def _median_of_others(ordered: Sequence[float], own: float) -> float:
    index = bisect_left(ordered, own)
    return median([*ordered[:index], *ordered[index + 1 :]])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"the model replica on ranks {', '.join(map(str, ranks))}"
