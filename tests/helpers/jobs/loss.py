"""One training step with each loss, from the same weights, cut into microbatches in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megadpo.data.loader import BatchBuilder, evaluation_batches, mean_chosen_length
from megadpo.loss.preference import PreferenceLoss
from megadpo.models.builder import load_model
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions
from megadpo.models.policy import PolicyModel
from megadpo.optimizer.build import build_optimizer, set_hyperparameters, wrap_data_parallel
from megadpo.reference import NoReference, Reference, ResidentReference
from megadpo.runtime.collectives import gather_rows
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from megadpo.setup.datasets import batch_shape
from megadpo.train.evaluation import evaluate
from megadpo.train.train_step import train_step
from tests.helpers.loss_cases import CASES, random_pairs

PAIRS = 8


@dataclass(frozen=True)
class Cut:
    """How the eight pairs are cut: at most `budget` tokens in a microbatch, prompts once or twice a pair."""

    budget: int
    share_prompt: bool = True


@dataclass(frozen=True)
class Step:
    """A step's mean loss, its gradient norm, its number of microbatches, and of pairs on this rank.

    `gradient_gap`, on a lone rank: how far the gradient is from that of the first cut, over its norm.
    """

    loss: float
    grad_norm: float
    microbatches: int
    own_pairs: int
    gradient_gap: float


@dataclass(frozen=True)
class Found:
    """A loss' steps, one a cut, and its means over the pairs in evaluation, one a size of group."""

    steps: list[Step]
    evaluations: list[float]


class _Trial:
    """A policy whose learning rate is 0, its reference, and what cuts pairs."""

    def __init__(self, policy: str, reference: str, layout: Mapping[str, int]) -> None:
        self.device = select_device("cpu")
        self.state = build_parallel_state(
            tensor=layout.get("tensor", 1),
            pipeline=layout.get("pipeline", 1),
            virtual_pipeline=None,
            seed=0,
            timeout_s=60,
        )
        self.arch = read_architecture(policy)
        self.modules = self._load(policy)
        self.reference = ResidentReference(self._load(reference), torch_device=self.device.torch_device)
        self.chunks = wrap_data_parallel(self.modules)
        self.settings: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        self.optimizer = build_optimizer(self.chunks, dtype=torch.float32, clip_grad=0.0, **self.settings)
        self.pairs = random_pairs(PAIRS, self.arch.vocab_size, seed=5)

    def _load(self, model: str) -> list[PolicyModel]:
        options = ModelOptions(device=self.device, dtype=torch.float32, sequence_parallel=self.state.tensor_size > 1)
        return load_model(self.arch, self.state, model, options)

    def builder(self, cut: Cut) -> BatchBuilder:
        return BatchBuilder(
            shape=batch_shape(self.state, sequence_parallel=self.state.tensor_size > 1),
            tokens_per_microbatch=cut.budget,
            pad_token_id=0,
            share_prompt=cut.share_prompt,
            flop_rates=self.arch.flop_rates,
        )

    def reference_of(self, loss: PreferenceLoss) -> Reference:
        if loss.needs_reference:
            return self.reference
        return NoReference(is_last_stage=self.state.is_last_stage, torch_device=self.device.torch_device)

    def mean(self, sums: Mapping[str, torch.Tensor]) -> float:
        """The mean loss over all pairs of all ranks."""
        counted = self.state.is_last_stage and self.state.tensor_rank == 0
        own = torch.stack([sums["loss"], sums["pairs"]]) if counted else torch.zeros(2, dtype=torch.float64)
        loss, pairs = gather_rows(own).sum(dim=0).tolist()
        assert pairs == PAIRS
        return loss / pairs

    def steps(self, loss: PreferenceLoss, cuts: Sequence[Cut]) -> list[Step]:
        steps, first = [], torch.empty(0)
        for cut in cuts:
            mean, grad_norm, *counts = self._step(loss, cut)
            gradient = torch.cat([weight.main_grad.flatten() for m in self.modules for weight in m.parameters()])
            first = gradient if not steps else first
            gap = float((gradient - first).norm() / first.norm())
            steps.append(Step(mean, grad_norm, *counts, gap))
        return steps

    def _step(self, loss: PreferenceLoss, cut: Cut) -> tuple[float, float, int, int]:
        set_hyperparameters(self.optimizer, **self.settings)
        batch = self.builder(cut).build(self.pairs)
        result = train_step(self.chunks, self.optimizer, self.reference_of(loss), loss, batch, device=self.device)
        own_pairs = sum(microbatch.num_pairs for microbatch in batch.microbatches)
        return self.mean(result.sums), result.update.grad_norm, len(batch.microbatches), own_pairs

    def evaluation(self, loss: PreferenceLoss, cut: Cut, group_size: int) -> float:
        batches = evaluation_batches(
            self.pairs,
            group_size=group_size,
            builder=self.builder(cut),
            mean_chosen_tokens=mean_chosen_length(self.pairs),
        )
        reference, device = self.reference_of(loss), self.device.torch_device
        return self.mean(evaluate(self.chunks, reference, loss, batches, torch_device=device))


def trials_of_every_loss(
    policy: str, reference: str, layout: Mapping[str, int], cuts: Sequence[Cut], group_sizes: Sequence[int] = ()
) -> dict[str, Found]:
    """What each loss is, cut in every way, and evaluated in groups of every size."""
    device = select_device("cpu")
    with megatron_device(device), distributed(device, timeout_s=60):
        trial = _Trial(policy, reference, layout)
        return {
            name: Found(
                trial.steps(case.loss(), cuts), [trial.evaluation(case.loss(), cuts[0], size) for size in group_sizes]
            )
            for name, case in CASES.items()
        }
