"""Every loss that TRL 1.16 has: its own code on the same token log-probs, value, gradient and logged rewards.

`DPOTrainer._compute_loss` runs on models that only hand out log-probs, so that nothing is trained; TRL's are fp64 here
but for the α-divergence, which it computes in fp32.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadpo.data.batch import PreferenceBatch
from megadpo.forward_step import preference_statistics, sum_log_probs
from megadpo.loss.logprobs import TokenScores
from megadpo.loss.preference import PreferenceLoss
from megadpo.loss.table import LOSSES, REFERENCE_FREE
from tests.helpers.loss_cases import CASES, LossCase, packed, random_logps, random_pairs

pytest.importorskip("trl", minversion="1.16", reason="TRL is the oracle of these tests")

PAIRS = 7
PROMPT = 3
TRL_DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}
# Of each loss with each divergence and with weighed tails, as far as it reads the keys.
CROSSED = {
    f"{name}, {text}": LossCase((name,), CASES[name].knobs | knobs)
    for name, spec in LOSSES.items()
    for text, knobs in {
        "forward kl": {"f_divergence": "forward_kl"},
        "js": {"f_divergence": "js"},
        "alpha": {"f_divergence": "alpha", "f_alpha_divergence_coef": 0.3},
        "ld": {"ld_alpha": 0.6},
    }.items()
    if next(iter(knobs)) in spec.knobs
}
# TRL's DPOTrainer has neither the smoothing of sigmoid nor IPO as published; their formulas are gated in unit tests.
DPO_CASES = {
    name: case
    for name, case in (CASES | CROSSED).items()
    if not {"simpo", "orpo"} & set(case.names) and name not in ("cdpo", "ipo of the paper")
}


@pytest.fixture(scope="module")
def batch() -> PreferenceBatch:
    microbatch = packed(random_pairs(PAIRS, 50, seed=3))
    lengths = microbatch.response_tokens_S.view(2, PAIRS)
    assert (lengths[0] < lengths[1]).any() and (lengths[0] > lengths[1]).any()
    return microbatch


@pytest.fixture(scope="module")
def logps(batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token log-probs under policy and reference, pair by pair."""
    policy_N = random_logps(len(batch.targets_N), seed=0)
    return policy_N, random_logps(len(policy_N), seed=1, like=policy_N)


def ours(
    loss: PreferenceLoss, batch: PreferenceBatch, policy_N: torch.Tensor, reference_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """(mean loss, its gradient in the tokens' log-probs, means of what is logged)."""
    leaf_N = policy_N.clone().requires_grad_()
    mean_chosen = float(batch.response_tokens_S[:PAIRS].double().mean())
    reference = sum_log_probs(batch, TokenScores(reference_N, None))
    total, sums, _ = preference_statistics(
        loss, batch, TokenScores(leaf_N, None), reference, mean_chosen_tokens=mean_chosen
    )
    mean = total / PAIRS
    (grad_N,) = torch.autograd.grad(mean, leaf_N)
    return mean.detach(), grad_N, {name: float(value) / PAIRS for name, value in sums.items()}


class _Model:
    """What TRL asks of a model, with the log-probs that it is to give: [2B, T − 1], 0 off the responses."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, log_probs: torch.Tensor) -> None:
        nothing = torch.zeros_like(log_probs)
        self.output = SimpleNamespace(
            log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), aux_loss=None
        )

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        return self.output


def by_sequence(batch: PreferenceBatch, values_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(TRL's [2B, T − 1] of token values, 1 where there is one), chosen sequences first, after a prompt of PROMPT."""
    longest = int(batch.response_tokens_S.max())
    column_N = torch.cat([torch.arange(int(n)) for n in batch.response_tokens_S.view(2, PAIRS).T.reshape(-1)])
    place = (batch.sequence_index_N, column_N + PROMPT - 1)
    empty = values_N.new_zeros(2 * PAIRS, PROMPT + longest - 1)
    return empty.index_put(place, values_N), empty.index_put(place, torch.ones_like(values_N))


def trl_dpo(
    case: LossCase, batch: PreferenceBatch, policy_N: torch.Tensor, reference_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """What TRL's DPOTrainer makes of the same numbers."""
    from trl import DPOTrainer

    leaf_N = policy_N.clone().requires_grad_()
    (policy, mask), (reference, _) = by_sequence(batch, leaf_N), by_sequence(batch, reference_N)
    completion_mask = torch.cat((torch.zeros(2 * PAIRS, 1), mask), dim=1).long()
    knobs = case.knobs
    divergence = knobs.get("f_divergence", "reverse_kl")
    trainer = DPOTrainer.__new__(DPOTrainer)
    attributes: dict[str, Any] = {
        "model": _Model(policy),
        "ref_model": _Model(reference),
        "accelerator": SimpleNamespace(device="cpu", gather=torch.atleast_1d, gather_for_metrics=torch.atleast_1d),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=knobs.get("discopop_tau", 0.05)),
        "aux_loss_enabled": False,
        "beta": knobs["beta"],
        "f_alpha_divergence_coef": knobs.get("f_alpha_divergence_coef", 0.5),
        "f_divergence_type": TRL_DIVERGENCES.get(divergence, divergence),
        "label_smoothing": knobs.get("label_smoothing", 0.0),
        "ld_alpha": knobs.get("ld_alpha"),
        "loss_types": list(case.names),
        "loss_weights": list(knobs.get("weights", [1.0] * len(case.names))),
        "precompute_ref_logps": False,
        "use_weighting": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in attributes.items():
        setattr(trainer, name, value)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    mean = trainer._compute_loss(trainer.model, inputs, False)
    (grad_N,) = torch.autograd.grad(mean, leaf_N)
    return mean.detach(), grad_N, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("name", DPO_CASES)
def test_loss_gradient_and_rewards_are_trls(
    name: str, batch: PreferenceBatch, logps: tuple[torch.Tensor, torch.Tensor]
) -> None:
    case = DPO_CASES[name]
    in_fp32 = case.knobs.get("f_divergence") == "alpha"
    dtype, tolerance = (torch.float32, 2e-5) if in_fp32 else (torch.float64, 1e-10)
    if "exo_pair" in case.names and not in_fp32:
        tolerance = 1e-7  # TRL has its label smoothing in fp32
    expected, expected_N, logged = trl_dpo(case, batch, *(logps_N.to(dtype) for logps_N in logps))
    mean, grad_N, means = ours(case.loss(), batch, *logps)
    torch.testing.assert_close(mean.to(dtype), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_N.to(dtype), expected_N, rtol=tolerance, atol=tolerance)
    if case.loss().needs_reference:
        for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
            in_single = in_fp32 or key == "rewards/accuracies"
            assert means[key] == pytest.approx(logged[key], rel=1e-5 if in_single else 1e-10, abs=1e-5 * in_fp32), key


@pytest.mark.parametrize("name", ["simpo", "smoothed simpo"])
def test_simpo_is_that_of_trls_cpo_trainer(
    name: str, batch: PreferenceBatch, logps: tuple[torch.Tensor, torch.Tensor]
) -> None:
    from trl.experimental.cpo import CPOTrainer

    case = CASES[name]
    trainer = CPOTrainer.__new__(CPOTrainer)
    trainer.alpha, trainer.loss_type, trainer.beta = 0.0, "simpo", case.knobs["beta"]
    trainer.simpo_gamma = case.knobs.get("simpo_gamma", 0.5)
    trainer.label_smoothing = case.knobs.get("label_smoothing", 0.0)
    trainer.accelerator = SimpleNamespace(device="cpu")
    leaf_N, means_B = mean_logps(batch, logps[0])
    losses_B, *rewards = trainer.cpo_loss(*means_B)
    check_reference_free(case, batch, logps, losses_B.mean(), leaf_N, rewards)


def test_orpo_is_trls_odds_ratio_with_the_papers_nll(
    batch: PreferenceBatch, logps: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """TRL's trainer adds the NLL of prompt and response; the paper's, and ours, is that of the response."""
    from trl.experimental.orpo import ORPOTrainer

    case = CASES["orpo"]
    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.beta, trainer.accelerator = case.knobs["beta"], SimpleNamespace(device="cpu")
    leaf_N, means_B = mean_logps(batch, logps[0])
    losses_B, *rewards = trainer.odds_ratio_loss(*means_B)[:3]
    check_reference_free(case, batch, logps, (-means_B[0] - losses_B).mean(), leaf_N, rewards, tolerance=2e-5)


def mean_logps(
    batch: PreferenceBatch, policy_N: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(the leaf, mean log-probs of the chosen and the rejected responses)."""
    leaf_N = policy_N.clone().requires_grad_()
    values, mask = by_sequence(batch, leaf_N)
    chosen_B, rejected_B = (values.sum(dim=1) / mask.sum(dim=1)).chunk(2)
    return leaf_N, (chosen_B, rejected_B)


def check_reference_free(
    case: LossCase,
    batch: PreferenceBatch,
    logps: tuple[torch.Tensor, torch.Tensor],
    expected: torch.Tensor,
    leaf_N: torch.Tensor,
    rewards: list[torch.Tensor],
    tolerance: float = 1e-10,
) -> None:
    """Fails unless our loss, its gradient and the logged rewards are those that TRL's function gave."""
    assert set(case.names) <= REFERENCE_FREE
    mean, grad_N, means = ours(case.loss(), batch, *logps)
    (expected_N,) = torch.autograd.grad(expected, leaf_N)
    torch.testing.assert_close(mean, expected.detach().double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_N, expected_N.double(), rtol=tolerance, atol=tolerance)
    for kind, reward_B in zip(("chosen", "rejected"), rewards, strict=True):
        assert means[f"rewards/{kind}"] == pytest.approx(float(reward_B.mean()), rel=max(tolerance, 1e-12))
