"""A replica that the others wait for is named, once; good runs stay silent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from megadpo.data.schedule import schedule_step
from megadpo.health.stragglers import BusyTime, StragglerWatch


def hear(watch: StragglerWatch, step: int, seconds: Sequence[float], *, data_s: float = 0.0, size: int = 1) -> str:
    """What is said after a step in which ranks were busy so long, `size` of them to a replica; data_s is the last's."""
    busy = [BusyTime(rank // size, own, 0.0, 1.0) for rank, own in enumerate(seconds)]
    busy[-1] = BusyTime(busy[-1].replica, seconds[-1], data_s, 1.0)
    return "\n".join(watch.observe(step, 1, busy))


def test_a_slow_rank_is_named_when_it_begins_and_when_it_ends() -> None:
    watch = StragglerWatch()
    said = {step: hear(watch, step, [1.0, 1.0, 2.0 if 11 <= step <= 40 else 1.1], data_s=0.25) for step in range(1, 61)}
    assert {step: text for step, text in said.items() if text} == {
        20: "straggler: rank 2 was busy 2 s a step before gradients could be exchanged (0.25 s of it waiting for "
        "data), the others 1 s and then wait; its work takes them 1 s (steps 11 to 20): look at its machine",
        50: "straggler: rank 2 is as fast as the others again, at step 50",
    }


def test_ranks_of_a_replica_are_named_together() -> None:
    watch = StragglerWatch()
    said = [hear(watch, step, [1.0, 1.0, 1.9, 2.0], size=2) for step in range(1, 11)]
    assert said[:9] == [""] * 9
    assert said[9].startswith("straggler: the model replica on ranks 2, 3 was busy 2 s")


@pytest.mark.parametrize("slow", [None, 1])
@pytest.mark.parametrize(
    ("replicas", "pairs", "budget"), [(8, 64, 8192), (64, 512, 8192), (8, 24, 4096), (8, 12, 2048)]
)
def test_who_has_more_work_is_no_straggler(replicas: int, pairs: int, budget: int, slow: int | None) -> None:
    """Work as the schedule deals it: often more than half as much again to the same replica in every step."""
    rng = np.random.default_rng(0)
    watch, said = StragglerWatch(), []
    for step in range(1, 101):
        lengths = rng.lognormal(np.log(900), 0.4, pairs).astype(int).tolist()
        schedule = schedule_step(lengths, lengths, budget=budget, data_parallel=replicas)
        work = [sum(lengths[i] for members in bins for i in members) + 1 for bins in schedule.bins_by_rank]
        busy = [
            BusyTime(replica, (0.05 + own / 8000 * rng.uniform(0.9, 1.1)) * (3 if replica == slow else 1), 0.0, own)
            for replica, own in enumerate(work)
        ]
        said += watch.observe(step, 1, busy)
    assert len(said) == (0 if slow is None else 1), said
    assert slow is None or "rank 1 was busy" in said[0]


def test_good_runs_stay_silent() -> None:
    """Single steps of which one takes twice as long, by chance; and one replica, with which nothing can be compared."""
    rng = np.random.default_rng(0)
    watch = StragglerWatch()
    for step in range(1, 2001):
        assert hear(watch, step, (1.0 + 0.2 * rng.random(4) + (rng.random(4) < 0.1)).tolist()) == ""
    quick = StragglerWatch()
    assert all(hear(quick, step, [0.03, 0.03, 0.12]) == "" for step in range(1, 31)), "nobody waits long"
    alone = StragglerWatch()
    assert all(hear(alone, step, [1.0, 9.0], size=2) == "" for step in range(1, 31))
