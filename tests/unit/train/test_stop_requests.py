"""Signals and the budget of hours, as one rank hears them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

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
