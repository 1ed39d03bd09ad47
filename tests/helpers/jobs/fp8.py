"""A small policy and its reference under an FP8 recipe, beside the same models without one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

import megadpo.setup.models
from megadpo.config.choices import ReferenceMode
from megadpo.data.loader import BatchBuilder, GlobalBatch
from megadpo.data.tokenization import TokenizedPair
from megadpo.errors import MegaDPOError
from megadpo.forward_step import score
from megadpo.loss.preference import PreferenceLoss, SequenceLogProbs
from megadpo.models.builder import load_model
from megadpo.models.fp8 import Fp8
from megadpo.models.fp8_recipes import default_format
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions
from megadpo.models.policy import PolicyModel
from megadpo.models.quantised import count_quantised, without_fp8
from megadpo.optimizer.build import build_optimizer, set_hyperparameters, wrap_data_parallel
from megadpo.reference import ResidentReference
from megadpo.runtime.device import Device, megatron_device, select_device
from megadpo.runtime.parallel_state import ParallelState, build_parallel_state, distributed
from megadpo.setup.datasets import batch_shape
from megadpo.setup.options import model_options
from megadpo.train.fp8_check import margin_errors
from megadpo.train.train_step import train_step
from tests.helpers.jobs.fault import captured_log
from tests.helpers.jobs.training import train

_PAIRS = 8
_BETA = 0.1
_LOSS = PreferenceLoss("sigmoid", beta=_BETA)


def emulated(recipe: str, **settings: Any) -> Fp8:
    """The recipe in emulation."""
    return Fp8(recipe=recipe, format=default_format(recipe), emulated=True, **settings)


def random_pairs(count: int, vocab_size: int) -> list[TokenizedPair]:
    """Pairs of 20 to 90 random tokens."""
    draw = np.random.default_rng(11)

    def tokens(low: int, high: int) -> np.ndarray:
        return draw.integers(3, vocab_size, size=draw.integers(low, high))

    return [TokenizedPair(index, tokens(8, 30), tokens(8, 30), tokens(8, 30)) for index in range(count)]


class Trial:
    """A bf16 policy that can be trained and its reference, both quantised as told, on one rank."""

    def __init__(self, model: str, state: ParallelState, device: Device, fp8: Fp8 | None) -> None:
        self.arch = read_architecture(model)
        self.device, self.state, self.fp8 = device, state, fp8
        self.modules = self._load(model)
        self.reference = ResidentReference(self._load(model), torch_device=device.torch_device)
        self.chunks = wrap_data_parallel(self.modules)
        self.settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        self.optimizer = build_optimizer(self.chunks, dtype=torch.bfloat16, clip_grad=1.0, **self.settings)
        self.builder = BatchBuilder(
            # The same streams for all, so that what differs is FP8.
            shape=batch_shape(state, sequence_parallel=False, fp8_recipe="blockwise"),
            tokens_per_microbatch=512,
            pad_token_id=0,
            share_prompt=True,
            flop_rates=self.arch.flop_rates,
            reference_flop_rates=self.arch.flop_rates,
        )
        self.pairs = random_pairs(40, self.arch.vocab_size)

    def _load(self, model: str) -> list[PolicyModel]:
        options = ModelOptions(device=self.device, dtype=torch.bfloat16, sequence_parallel=False, fp8=self.fp8)
        chunks = load_model(self.arch, self.state, model, options)
        if self.fp8 is not None:
            count_quantised(chunks, self.fp8)
        return chunks

    def batch(self, step: int) -> GlobalBatch:
        """The pairs of a step."""
        start = step * _PAIRS % len(self.pairs)
        return self.builder.build(self.pairs[start : start + _PAIRS])

    def logps_per_token(self) -> torch.Tensor:
        """Log-probs of all response tokens of the first step under the policy."""
        rows = []
        for microbatch in self.batch(0).microbatches:
            with torch.no_grad():
                scores = self.modules[0](
                    microbatch.tokens_1T,
                    microbatch.positions_T,
                    microbatch.plan,
                    microbatch.response_rows_N,
                    microbatch.targets_N,
                )
            rows.append(scores.logps_N)
        return torch.cat(rows)

    def train(self, steps: Sequence[int]) -> list[float]:
        """The loss of each step before its update."""
        losses = []
        for step in steps:
            set_hyperparameters(self.optimizer, **self.settings)
            batch = self.batch(step)
            result = train_step(self.chunks, self.optimizer, self.reference, _LOSS, batch, device=self.device)
            losses.append(float(result.sums["loss"] / result.sums["pairs"]))
        return losses

    def gradient(self) -> torch.Tensor:
        """The gradient of the last step's loss, all weights in one vector."""
        return torch.cat([parameter.main_grad.flatten() for parameter in self.modules[0].parameters()]).double()

    def margins(self) -> torch.Tensor:
        """Log-prob margins of the first step's pairs, policy less reference."""
        device = self.device.torch_device
        batch = self.batch(0)
        policy, reference = score(self.chunks, batch, torch_device=device), self.reference.log_probs(batch)
        return torch.cat(
            [p.chosen_B - p.rejected_B - (r.chosen_B - r.rejected_B) for p, r in zip(policy, reference, strict=True)]
        )


@dataclass(frozen=True)
class Gates:
    """What a recipe does to a model, beside the same model without FP8."""

    logps_rms: float
    """of the response tokens' log-probs, before training"""
    first_loss: float
    cosine: float
    """of the first step's gradients"""
    loss_gap: float
    """the largest of all steps"""
    checked: dict[str, float]
    """what `margin_errors` says after training"""
    errors: list[float]
    """of the same margins, from models without FP8 that were given the trained weights"""


def gates(model: str, recipes: Sequence[str], steps: int) -> dict[str, Gates]:
    """The gates of this rank's share of the recipes; each rank is a world of its own."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = select_device("cpu")
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    with (
        mock.patch.dict(os.environ, alone, clear=True),
        megatron_device(device),
        distributed(device, timeout_s=60),
    ):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        plain = Trial(model, state, device, None)
        logps_N = plain.logps_per_token()
        losses = plain.train([0])
        gradient = plain.gradient()
        losses += plain.train(range(1, steps))
        found = {}
        for recipe in recipes[rank::world_size]:
            trial = Trial(model, state, device, emulated(recipe))
            rms = (trial.logps_per_token() - logps_N).square().mean().sqrt()
            own_losses = trial.train([0])
            cosine = torch.nn.functional.cosine_similarity(trial.gradient(), gradient, dim=0)
            own_losses += trial.train(range(1, steps))
            plain.modules[0].load_state_dict(trial.modules[0].state_dict(), strict=False)
            found[recipe] = Gates(
                logps_rms=float(rms),
                first_loss=own_losses[0],
                cosine=float(cosine),
                loss_gap=max(abs(a - b) for a, b in zip(own_losses, losses, strict=True)),
                checked=margin_errors(
                    trial.chunks, trial.reference, _LOSS, trial.batch(0), state=state, torch_device=device.torch_device
                ),
                errors=(_BETA * (trial.margins() - plain.margins())).abs().tolist(),
            )
        return found


class _PlainReference(ResidentReference):
    """A reference that computes without FP8."""

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        with without_fp8(self.chunks):
            return super().log_probs(batch)


def train_and_log(words: list[str]) -> list[str]:
    """The lines that a training has logged."""
    with captured_log() as log:
        train(words)
    return log


def refusal_of_a_plain_reference(words: list[str]) -> str:
    """What is said of a reference that was built in FP8 and computes without."""
    with mock.patch.dict(megadpo.setup.models._REFERENCES, {ReferenceMode.resident: _PlainReference}):
        return _refusal(words)


def refusal_of_layers_left_out(words: list[str]) -> str:
    """What is said of models that were built without the FP8 that is asked for."""

    def forgetful(*args: Any, **options: Any) -> ModelOptions:
        return replace(model_options(*args, **options), fp8=None)

    with mock.patch.object(megadpo.setup.models, "model_options", forgetful):
        return _refusal(words)


def _refusal(words: list[str]) -> str:
    try:
        return train(words)
    except MegaDPOError as error:
        return str(error)
