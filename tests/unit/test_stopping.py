"""Signals and the budget of hours, as one rank hears them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megadpo.errors import Stopped, TrainingError
from megadpo.setup import launch as launches
from megadpo.setup.launch import Launch, find_launch, note_launch
from megadpo.train import stop_requests
from megadpo.train.stop_requests import StopRequests


def until_heard(requests: StopRequests) -> float:
    """The vote once it is not 0, within 5 seconds."""
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        vote = requests.vote(0.0)
        if vote:
            return vote
        time.sleep(0.01)
    raise AssertionError("no signal was heard")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_vote(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests(max_hours=None, began=time.time()) as requests:
        assert requests.vote(0.0) == 0.0
        assert requests.reason(0.0) is None
        os.kill(os.getpid(), number)
        vote = until_heard(requests)
        assert requests.reason(vote) == number.name
        assert requests.vote(0.0) == vote
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_are_none_of_its_business() -> None:
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with StopRequests(max_hours=None, began=time.time()) as requests:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.05)
            assert requests.vote(0.0) == 0.0
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


@pytest.mark.parametrize("where", ["time.sleep(30)", "lock.acquire()"], ids=["sleeping", "in a C call that waits"])
def test_a_second_signal_ends_the_process_wherever_it_is(where: str) -> None:
    """A lock in the main thread stands for a collective: no instruction of Python runs before it is there."""
    program = (
        "import threading, time\n"
        "from megadpo.train.stop_requests import StopRequests\n"
        "lock = threading.Lock(); lock.acquire()\n"
        "with StopRequests(max_hours=None, began=time.time()):\n"
        "    print('ready', flush=True)\n"
        f"    {where}\n"
        "    lock.acquire()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    for _ in range(2):  # to the process, and once more by its launcher
        child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert child.poll() is None
    time.sleep(3.0)
    child.send_signal(signal.SIGUSR1)
    assert child.wait(timeout=5.0) == 128 + signal.SIGUSR1
    child.stdout.close()


def test_a_budget_leaves_room_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(stop_requests.time, "monotonic", lambda: clock[0])
    began = time.time() - 1800.0  # half an hour went into earlier starts of the launch
    requests = StopRequests(max_hours=1.0, began=began)
    clock[0] += 100.0
    assert requests.vote(save_s=50.0) == 0.0
    clock[0] += 1549.0  # 151 s are left before the end, a round takes up to 1549
    assert requests.reason(requests.vote(save_s=50.0)) == "train.max_hours=1"


def test_short_rounds_use_the_budget_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(stop_requests.time, "monotonic", lambda: clock[0])
    requests = StopRequests(max_hours=1.0, began=time.time() + 500.0)  # a clock that was set back adds nothing
    votes = 0
    while requests.vote(save_s=30.0) == 0.0:
        clock[0] += 10.0
        votes += 1
    assert votes == 357  # the first whose round of 10 s and save of 30 s would end behind 3600 s


@pytest.fixture
def agents() -> Iterator[tuple[int, int]]:
    """Two processes that could be torchrun, the second started 0.1 s after the first; their ids."""
    with ExitStack() as stack:
        pids = []
        for _ in range(2):
            agent = stack.enter_context(subprocess.Popen(["sleep", "60"]))
            stack.callback(agent.kill)
            pids.append(agent.pid)
            time.sleep(0.1)
        yield pids[0], pids[1]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Launch]:
    """What a start of some ranks finds, under the torchrun that has this process id, and calls the launch `name`."""

    def call(agent: int, name: str = "megadpo") -> Launch:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setattr(launches.os, "getppid", lambda: agent)
        return find_launch(tmp_path)

    return call


def test_a_launch_begins_with_torchrun(start: Callable[..., Launch], agents: tuple[int, int], tmp_path: Path) -> None:
    launch = start(agents[0])
    assert launch.began == psutil.Process(agents[0]).create_time()
    note_launch(tmp_path, launch)
    assert start(agents[0]) == launch, "a restart goes on with the budget of its launch"
    (tmp_path / ".launch.json").unlink()
    assert start(agents[0]).began == launch.began, "also where the first start has died before it noted anything"


def test_without_torchrun_each_start_is_a_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parent may be a shell that has been there for days."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    launch = find_launch(tmp_path)
    assert launch.began == psutil.Process().create_time()
    note_launch(tmp_path, replace(launch, stopped="SIGTERM"))
    assert find_launch(tmp_path).stopped is None
    assert not (tmp_path / ".launch.json").exists()


def test_a_launch_that_was_stopped_is_not_begun_again(
    start: Callable[..., Launch], agents: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever torchrun's count says: it stays 0 on machines where no rank has failed by itself."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    stopped = replace(start(agents[0]), stopped="SIGTERM")
    note_launch(tmp_path, stopped)
    with pytest.raises(Stopped, match="stopped by SIGTERM: it is not begun again"):
        start(agents[0])
    note_launch(tmp_path, replace(stopped, wrong=True))
    with pytest.raises(TrainingError, match="it is not begun again; what was found is in the log before"):
        start(agents[0])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start(agents[1]).stopped is None, "the same name in a new launch on this machine"
    assert start(agents[0]).stopped is None, "whose note took the place of the other's"
    for other in (replace(stopped, uptime=stopped.uptime - 60.0), replace(stopped, id="another")):
        note_launch(tmp_path, other)
        assert start(agents[0]).stopped is None, "a process id that has come again; another name"


def test_rank_0_may_come_to_another_machine(
    start: Callable[..., Launch], agents: tuple[int, int], tmp_path: Path
) -> None:
    launch = replace(start(agents[0]), host="node1")
    note_launch(tmp_path, launch)
    assert start(agents[0]) == launch, "this agent was there when the first ranks had met"
    note_launch(tmp_path, replace(launch, met=launch.began - 60.0))
    assert start(agents[0]).host != "node1", "a later launch of the same name"


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"id": "megadpo"})])
def test_a_torn_note_is_no_note(
    content: str, start: Callable[..., Launch], agents: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / ".launch.json").write_text(content)
    assert start(agents[0]).id == "megadpo"
