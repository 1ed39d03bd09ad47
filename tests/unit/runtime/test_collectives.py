"""Our collectives over two real ranks; one launch serves all tests."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadpo.errors import ConfigError
from megadpo.metrics.reduction import Metric, Reduction, reduce_metrics
from megadpo.runtime.collectives import broadcast_from_main, check_all_agree, gather_rows, on_main
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import distributed
from tests.helpers.launch import launch

CPU = torch.device("cpu")


def talk() -> dict[str, Any]:
    """What one rank hears in each collective."""
    with distributed(Device("cpu", CPU), timeout_s=60):
        rank = dist.get_rank()
        check_all_agree("configuration", "the same")
        try:
            check_all_agree("configuration", f"rank {rank}")
            disagreement = None
        except ConfigError as error:
            disagreement = str(error)
        metrics = {
            "pairs": Metric(torch.tensor(3.0 + rank), Reduction.SUM),
            "time/step_s": Metric(0.5 - rank, Reduction.MAX),
        }
        return {
            "disagreement": disagreement,
            "broadcast": broadcast_from_main({"run_dir": f"outputs/{rank}"}),
            "rows": gather_rows(torch.tensor([rank, 10.0 + rank], dtype=torch.float64)).tolist(),
            "reduced": reduce_metrics(metrics, gather=gather_rows, torch_device=CPU),
        }


@pytest.fixture(scope="module")
def heard() -> list[dict[str, Any]]:
    return launch(2, talk)


def test_a_disagreement_is_raised_on_every_rank(heard: list[dict[str, Any]]) -> None:
    for rank in heard:
        assert rank["disagreement"].startswith("ranks [1] see another configuration than rank 0. Start every rank")


def test_rank_0_speaks_for_all(heard: list[dict[str, Any]]) -> None:
    assert [rank["broadcast"] for rank in heard] == [{"run_dir": "outputs/0"}] * 2


def test_rows_come_in_rank_order(heard: list[dict[str, Any]]) -> None:
    assert [rank["rows"] for rank in heard] == [[[0.0, 10.0], [1.0, 11.0]]] * 2


def test_metrics_are_reduced_alike_everywhere(heard: list[dict[str, Any]]) -> None:
    assert [rank["reduced"] for rank in heard] == [{"pairs": 7.0, "time/step_s": 0.5}] * 2


def wait_for_slow_work() -> dict[str, Any]:
    """What one rank gets of work on rank 0 that takes longer than its collectives wait."""

    def slow() -> str:
        time.sleep(3)
        return "done"

    def failing() -> str:
        raise ConfigError("key=1: must be 2: set it")

    with distributed(Device("cpu", CPU), timeout_s=1):
        result = {"slow": on_main(slow, patience_s=60)}
        for patience_s in (None, 60.0):
            with pytest.raises(ConfigError) as error:
                on_main(failing, patience_s=patience_s)
            result[f"error {patience_s}"] = str(error.value)
        return result


def test_ranks_wait_for_slow_work_and_hear_how_it_went() -> None:
    said = "key=1: must be 2: set it"
    assert launch(2, wait_for_slow_work) == [{"slow": "done", "error None": said, "error 60.0": said}] * 2


def test_one_rank_agrees_with_itself() -> None:
    with distributed(Device("cpu", CPU), timeout_s=60):
        check_all_agree("configuration", "alone")
        assert broadcast_from_main("alone") == "alone"
        assert gather_rows(torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]]
