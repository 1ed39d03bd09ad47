"""Weights that wait on the host are on the device during a pass only; mixing moves them towards the policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megadpo.planner.meter import LiveBytes
from megadpo.reference import OffloadedReference, ResidentReference, resident

CPU = torch.device("cpu")


@pytest.fixture
def scored() -> Iterator[list[Any]]:
    """What stands in for a pass: the weights' values and the living bytes while it runs."""
    seen: list[Any] = []

    def score(chunks: list[torch.nn.Module], batch: LiveBytes, *, torch_device: torch.device) -> list[Any]:
        seen.append((batch.now, [p.detach().float().numpy().copy() for chunk in chunks for p in chunk.parameters()]))
        return []

    with mock.patch.object(resident, "score", score):
        yield seen


def test_offloaded_weights_are_on_the_device_during_the_pass_only(scored: list[Any]) -> None:
    chunks = [torch.nn.Linear(300, 200), torch.nn.Linear(200, 100, bias=False)]
    expected = [p.detach().numpy().copy() for chunk in chunks for p in chunk.parameters()]
    size = 4 * (300 * 200 + 200 + 200 * 100)
    assert ResidentReference(chunks, torch_device=CPU).device_bytes() == size
    reference = OffloadedReference(chunks, torch_device=CPU)
    with LiveBytes() as meter:
        for _ in range(2):
            assert (meter.now, reference.device_bytes()) == (0, 0)
            reference.log_probs(meter)  # type: ignore[arg-type]
        reference.prepare()
        assert meter.now == reference.device_bytes() == size
        reference.log_probs(meter)  # type: ignore[arg-type]
        assert (meter.now, meter.peak, reference.device_bytes()) == (0, size, 0)
    assert [now for now, _ in scored] == [size] * 3
    for _, values in scored:
        assert all(np.array_equal(a, b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("kind", [ResidentReference, OffloadedReference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_moves_every_weight_towards_the_policy(
    kind: type[ResidentReference], dtype: torch.dtype, scored: list[Any]
) -> None:
    own, policy = (torch.nn.Linear(50, 40).to(dtype) for _ in range(2))
    before, target = own.weight.detach().clone(), policy.weight.detach()
    reference = kind([own], torch_device=CPU)
    reference.follow([policy], 0.25)
    with LiveBytes() as meter:
        reference.log_probs(meter)  # type: ignore[arg-type]
    half_ulp = 2**-9 if dtype is torch.bfloat16 else 2**-24
    exact = 0.75 * before.double() + 0.25 * target.double()
    assert (torch.from_numpy(scored[0][1][0]).double() - exact).abs().max() <= half_ulp * float(exact.abs().max()) * 2
    reference.follow([policy], 1.0)
    with reference.weights():
        assert torch.equal(own.weight, target)


@pytest.mark.parametrize("kind", [ResidentReference, OffloadedReference])
def test_a_checkpoint_holds_the_weights_of_a_reference_that_follows(kind: type[ResidentReference]) -> None:
    own = torch.nn.Linear(5, 4)
    before = own.weight.detach().clone()
    with kind([own], torch_device=CPU, follows=True).saved() as chunks:
        assert torch.equal(chunks[0].weight, before)
    with kind([own], torch_device=CPU).saved() as chunks:
        assert list(chunks) == [], "one that never changes is read again from where it came"
