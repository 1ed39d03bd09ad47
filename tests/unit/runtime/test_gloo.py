"""Collectives made of messages give what torch's give; one launch of four ranks serves all tests."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import layers, mappings

from megadpo.runtime.device import Device, megatron_device
from megadpo.runtime.gloo import all_gather, reduce_scatter
from megadpo.runtime.parallel_state import distributed
from tests.helpers.launch import launch

CPU = torch.device("cpu")
RANKS = 4
GROUPS = {"all ranks": [[0, 1, 2, 3]], "pairs": [[0, 2], [1, 3]], "lone ranks": [[0], [1], [2], [3]]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# fp32 sums in another order; bf16 rounds each addition.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}
CASES = [
    (group, dtype, in_place, async_op)
    for group in GROUPS
    for dtype in DTYPES
    for in_place in (False, True)
    for async_op in (False, True)
]


def values(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(rank)).to(dtype)


def errors_of(case: tuple[str, str, bool, bool], group: dist.ProcessGroup, ranks: list[int]) -> dict[str, float]:
    """Largest differences from what the results must be, on this rank; the second call of each is to find no leftovers.

    In place, this rank's own part of the larger tensor is the smaller one.
    """
    _, dtype_name, in_place, async_op = case
    dtype, own, rows = DTYPES[dtype_name], dist.get_rank(), 2 * len(ranks)
    place = slice(2 * ranks.index(own), 2 * ranks.index(own) + 2)
    total = sum(values(rank, rows, dtype).double() for rank in ranks)
    gathered = torch.cat([values(rank, 2, dtype) for rank in ranks])
    worst = {"reduce_scatter": 0.0, "all_gather": 0.0}
    for _ in range(2):
        inputs = values(own, rows, dtype)
        output = inputs[place] if in_place else torch.full((2, 3), torch.nan, dtype=dtype)
        work = reduce_scatter(output, inputs, group=group, async_op=async_op)
        assert (work is not None) == async_op
        if work is not None:
            work.wait()
        error = (output.double() - total[place]).abs().max() / total.abs().max()
        worst["reduce_scatter"] = max(worst["reduce_scatter"], float(error.nan_to_num(torch.inf)))

        whole = torch.full((rows, 3), torch.nan, dtype=dtype)
        part = whole[place] if in_place else torch.empty(2, 3, dtype=dtype)
        part.copy_(values(own, 2, dtype))
        work = all_gather(whole, part, group=group, async_op=async_op)
        assert (work is not None) == async_op
        if work is not None:
            work.wait()
        worst["all_gather"] = max(worst["all_gather"], float(not torch.equal(whole, gathered)))
    return worst


def three_in_flight() -> list[list[float]]:
    """The results of exchanges that are waited for in another order than they were started; one gathers a column."""
    own = float(dist.get_rank())
    summed = [torch.zeros(size) for size in (1, 40_000)]
    columns = torch.stack((torch.full((3,), own), torch.zeros(3)), dim=1)
    gathered = torch.zeros(RANKS * 3)
    works = [reduce_scatter(total, torch.full((RANKS * len(total),), own), async_op=True) for total in summed]
    works.append(all_gather(gathered, columns[:, 0], async_op=True))
    for work in reversed(works):
        assert work is not None
        work.wait()
    return [tensor.unique().tolist() for tensor in (*summed, gathered)]


def talk() -> dict[str, Any]:
    """What one rank finds in every case, and what it is told of a reduction other than a sum."""
    with distributed(Device("cpu", CPU), timeout_s=60):
        # new_group is collective: every rank makes every group.
        made = {name: [(ranks, dist.new_group(ranks)) for ranks in lists] for name, lists in GROUPS.items()}
        found: dict[Any, Any] = {}
        for case in CASES:
            ranks, group = next(item for item in made[case[0]] if dist.get_rank() in item[0])
            found[case] = errors_of(case, group, ranks)
        found["in flight"] = three_in_flight()
        with pytest.raises(ValueError, match="sums"):
            reduce_scatter(torch.zeros(1), torch.zeros(RANKS), op=dist.ReduceOp.MAX)
        world = torch.zeros(RANKS)
        all_gather(world, torch.tensor([float(dist.get_rank())]))
        found["world"] = world.tolist()
        return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return launch(RANKS, talk)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_the_collectives(case: Any, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank[case]["reduce_scatter"] <= TOLERANCE[case[1]]
        assert rank[case]["all_gather"] == 0


def test_without_a_group_all_ranks_take_part(found: list[dict[str, Any]]) -> None:
    assert [rank["world"] for rank in found] == RANKS * [[0.0, 1.0, 2.0, 3.0]]


def test_exchanges_do_not_mix(found: list[dict[str, Any]]) -> None:
    assert [rank["in flight"] for rank in found] == RANKS * [[[6.0], [6.0], [0.0, 1.0, 2.0, 3.0]]]


def test_megatron_calls_them() -> None:
    with megatron_device(Device("cpu", CPU)):
        for module in (layers, mappings):
            assert module.dist_reduce_scatter_func is reduce_scatter
            assert module.dist_all_gather_func is all_gather
        lone: Any = mock.Mock(**{"size.return_value": 1, "rank.return_value": 0})
        # torch's own would ask a real group.
        for collective in (param_and_grad_buffer.dist_reduce_scatter_func, param_and_grad_buffer.dist_all_gather_func):
            output = torch.zeros(2)
            collective(output, torch.ones(2), group=lone, async_op=False)
            assert output.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["dist_reduce_scatter_func", "dist_all_gather_func"])
def test_overlapped_buffers_are_left_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its coalescing manager waits for works that torch's functions leave behind."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(param_and_grad_buffer, name, lambda *_, **options: seen.append(options))
    with megatron_device(Device("cpu", CPU)):
        getattr(param_and_grad_buffer, name)(torch.zeros(1), torch.zeros(1), group="a group", async_op=True)
    assert seen == [{"group": "a group", "async_op": True}]
