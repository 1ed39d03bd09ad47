"""Training while numbers go bad on one rank: NaN and infinities planted for real, and bits flipped."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

import megadpo.optimizer.build
import megadpo.setup.session
import megadpo.train.train_step
import megadpo.train.trainer
from megadpo.errors import MegaDPOError
from megadpo.models.fp8_emulation import EmulatedLinear
from megadpo.optimizer.build import distributed_optimizers, gather_weights
from megadpo.optimizer.guarded_update import Update, guarded_update
from megadpo.train.train_step import StepResult, train_step
from tests.helpers.jobs.fault import captured_log
from tests.helpers.jobs.training import train


@dataclass(frozen=True)
class Fault:
    """What goes bad on `rank` in a step.

    `where` is "loss" (an infinite one), "before" or "after" (NaN in the gradients of parameters whose name ends in
    `name`, before or after they are reduced), "bit" (flipped in the first such parameter before the step, or, with
    `late`, behind its backward pass), or "nan" (in such a parameter, before the step).
    """

    rank: int
    where: str
    name: str = ""
    late: bool = False


@dataclass
class Seen:
    """What one rank saw: the error that ended the run, the log; of each step why it was skipped, what changed."""

    error: str = ""
    log: list[str] = field(default_factory=list)
    skipped: dict[int, tuple[str, ...]] = field(default_factory=dict)
    changed: dict[int, bool] = field(default_factory=dict)
    votes: dict[int, tuple[float, ...]] = field(default_factory=dict)


def train_with_faults(overrides: list[str], faults: Mapping[int, Sequence[Fault]], first_step: int = 1) -> Seen:
    """`train`, with faults at some steps, and votes from every rank: its number, and the number's negative."""
    plan, seen = _Plan(faults, step=first_step - 1), Seen()
    with ExitStack() as stack:
        seen.log = stack.enter_context(captured_log())
        stack.enter_context(plan.carried_out())
        stack.enter_context(mock.patch.object(megadpo.train.trainer, "train_step", _watching(plan, seen)))
        stack.enter_context(mock.patch.object(megadpo.train.train_step, "guarded_update", _voting_twice(plan, seen)))
        try:
            train(overrides)
        except MegaDPOError as error:
            seen.error = f"{type(error).__name__}: {error}"
    return seen


def start_with_another_program(overrides: list[str]) -> str:
    """What `train` says where rank 1 has other files."""
    other = {"described_program": lambda: f"megadpo {os.environ['RANK']}"}
    with mock.patch.multiple(megadpo.setup.session, **other):
        try:
            return train(overrides)
        except MegaDPOError as error:
            return str(error)


class _Plan:
    def __init__(self, faults: Mapping[int, Sequence[Fault]], *, step: int) -> None:
        self.faults = faults
        self.step = step

    def due(self, where: str, *, late: bool = False) -> list[Fault]:
        own = [fault for fault in self.faults.get(self.step, ()) if fault.rank == dist.get_rank()]
        return [fault for fault in own if (fault.where, fault.late) == (where, late)]

    @contextmanager
    def carried_out(self) -> Iterator[None]:
        finalize, statistics = (
            megadpo.train.train_step.finalize_model_grads,
            megadpo.train.train_step.preference_statistics,
        )

        def finalize_badly(chunks: Sequence[DistributedDataParallel], *args: Any, **options: Any) -> None:
            for fault in self.due("before"):
                _spoil_gradients(chunks, fault)
            finalize(chunks, *args, **options)
            for fault in self.due("after"):
                _spoil_gradients(chunks, fault)
            for fault in self.due("bit", late=True):
                flip_a_bit(chunks, fault.name)

        def infinite(*args: Any, **options: Any) -> Any:
            loss, sums, numbers_B5 = statistics(*args, **options)
            if self.due("loss") and len(numbers_B5):
                loss, sums["loss"] = loss * math.inf, sums["loss"] * math.inf
                numbers_B5[0, 4] = math.inf
            return loss, sums, numbers_B5

        with (
            mock.patch.object(megadpo.train.train_step, "finalize_model_grads", finalize_badly),
            mock.patch.object(megadpo.train.train_step, "preference_statistics", infinite),
        ):
            yield


def _spoil_gradients(chunks: Sequence[DistributedDataParallel], fault: Fault) -> None:
    weights = [weight for chunk in chunks for name, weight in chunk.named_parameters() if name.endswith(fault.name)]
    assert weights, fault
    for weight in weights:
        weight.main_grad.view(-1)[::7] = math.nan


def flip_a_bit(chunks: Sequence[torch.nn.Module], name: str) -> None:
    """Flips the lowest bit of the last element of a parameter."""
    weight = _weight(chunks, name)
    words = weight.data.view(-1).view({2: torch.int16, 4: torch.int32}[weight.element_size()])
    words[-1] ^= 1


def _weight(chunks: Sequence[torch.nn.Module], name: str) -> torch.Tensor:
    """The first parameter whose name ends so."""
    return next(weight for chunk in chunks for own, weight in chunk.named_parameters() if own.endswith(name))


Votes = Callable[[], Sequence[float]]


def _watching(plan: _Plan, seen: Seen) -> Callable[..., StepResult]:
    def watched(chunks: Any, optimizer: Any, *args: Any, **options: Any) -> StepResult:
        plan.step += 1
        for fault in plan.due("bit"):
            flip_a_bit(chunks, fault.name)
        for fault in plan.due("nan"):
            _weight(chunks, fault.name).data.view(-1)[-1] = math.nan
        gather_weights(chunks)  # those of the last update, where they would come with the forward
        before = _everything(chunks, optimizer)
        result = train_step(chunks, optimizer, *args, **options)
        after = _everything(chunks, optimizer)
        seen.skipped[plan.step] = result.update.skipped
        seen.changed[plan.step] = len(before) != len(after) or not all(map(_equal_bits, before, after))
        return result

    return watched


def _voting_twice(plan: _Plan, seen: Seen) -> Callable[..., Update]:
    """An update to which each rank's number, and its negative, are further votes; `seen` gets the largest of them."""

    def update(*args: Any, votes: Callable[[], Sequence[float]], **options: Any) -> Update:
        rank = float(dist.get_rank())
        made = guarded_update(*args, votes=lambda: (*votes(), rank, -rank), **options)
        seen.votes[plan.step] = made.votes[-2:]
        return replace(made, votes=made.votes[:-2])

    return update


def _everything(chunks: Any, optimizer: Any) -> list[torch.Tensor]:
    """Copies of what an update changes: weights, main weights, moments, step counters, amax histories."""
    found = [weight.detach().clone() for chunk in chunks for weight in chunk.parameters()]
    for member in distributed_optimizers(optimizer):
        found += [weight.detach().clone() for weight in member.get_parameters()]
        for state in member.optimizer.state.values():
            found += [value.reshape(-1).clone() for value in state.values() if isinstance(value, torch.Tensor)]
        found += [torch.tensor([float(group.get("step", 0))]) for group in member.optimizer.param_groups]
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, EmulatedLinear)):
        found += [amax.reshape(1).clone() for history in layer.histories.values() for amax in history.amaxes]
    return found


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
