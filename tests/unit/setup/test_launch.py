"""A launch of torchrun: when it began, on which machine, and that one which was stopped is not begun again."""

from __future__ import annotations

import json
import subprocess
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
