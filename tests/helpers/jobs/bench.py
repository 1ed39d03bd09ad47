"""What the contenders of tools/bench do in a test: so many steps, the answers in a list instead of a pipe.

The importer has put tools/ on the path, as `python tools/bench/dpo.py` does.
"""

from __future__ import annotations

import os
from typing import Any

from bench.job import Finished, Job, Link

from megadpo.runtime.device import select_device


class ListLink(Link):
    """A link whose parent asks for so many steps and keeps the answers."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.answers: list[dict[str, Any]] = []

    def answer(self, **values: Any) -> None:
        self.answers.append(values)

    def wait(self) -> None:
        if self.left == 0:
            raise Finished
        self.left -= 1


def answers(contender: str, job: Job, steps: int) -> list[dict[str, Any]]:
    """What a contender answers for its steps; its first answer, that it is ready, left out."""
    link = ListLink(steps)
    try:
        if contender == "megadpo":
            from bench import megadpo_child

            megadpo_child.run(job, link)
        elif contender == "trl":
            # The launcher's variables would have it wrap its model for other ranks.
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                del os.environ[name]
            from bench import trl_child

            trl_child.run(job, link, select_device("cpu"))
        else:
            from bench import naive_child

            naive_child.run(job, link, select_device("cpu"))
    except Finished:
        pass
    assert link.answers[0] == {"ready": True}
    return link.answers[1:]
