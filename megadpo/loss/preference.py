"""Preference losses and their mixes on log-probs per pair, and the statistics to log. Legend: B pairs, all fp64.

The formulas are in formulas.py, their properties in table.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megadpo.loss.formulas import FORMULAS, LossKnobs, PairTerms, divergence_score
from megadpo.loss.table import REFERENCE_FREE, needs_reference

# Metrics logged as means over pairs, under TRL's names.
STATISTICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
)
# Optional metrics of response tokens, under TRL's names, and the count of the tokens that each is a mean over: the
# entropy of all of them, and the share of the chosen ones that are the policy's first choice.
TOKEN_STATISTICS = {"entropy": "response_tokens", "mean_token_accuracy": "chosen_tokens"}
# The scored tokens of a pair's responses, logged as means; and products of length gaps and margins, which give, with
# the sums above, their correlation.
LENGTHS = ("lengths/chosen", "lengths/rejected")
LENGTH_PRODUCTS = ("gap_x_gap", "gap_x_margin", "margin_x_margin")
# Everything that is summed up over ranks and steps.
SUMS = (*STATISTICS, *LENGTHS, *LENGTH_PRODUCTS, "pairs", *TOKEN_STATISTICS, *TOKEN_STATISTICS.values())

Responses = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class SequenceLogProbs:
    """Summed log-probs (nats) of B pairs' responses under one model, fp64 [B] each.

    A tail is the sum over the tokens of a response beyond the length of its pair's shorter response.
    """

    chosen_B: torch.Tensor
    rejected_B: torch.Tensor
    chosen_tail_B: torch.Tensor
    rejected_tail_B: torch.Tensor

    @classmethod
    def of_columns(cls, logps_B4: torch.Tensor) -> SequenceLogProbs:
        """Builds it from the output of `columns`."""
        return cls(*logps_B4.unbind(dim=1))

    def columns(self) -> torch.Tensor:
        """The fields in their order as columns: [B, 4]."""
        return torch.stack((self.chosen_B, self.rejected_B, self.chosen_tail_B, self.rejected_tail_B), dim=1)

    def with_weighted_tails(self, ld_alpha: float | None) -> Responses:
        """Chosen and rejected sums with tails weighted by `ld_alpha` (LD-DPO, Liu et al. 2024); None: by 1."""
        if ld_alpha is None:
            return self.chosen_B, self.rejected_B
        lost = 1.0 - ld_alpha
        return self.chosen_B - lost * self.chosen_tail_B, self.rejected_B - lost * self.rejected_tail_B


@dataclass(frozen=True, slots=True)
class PairLogProbs:
    """B pairs under policy and reference, and the response lengths in tokens.

    `mean_chosen_tokens` is the mean length of the chosen responses in the global batch.
    """

    policy: SequenceLogProbs
    reference: SequenceLogProbs
    chosen_tokens_B: torch.Tensor
    rejected_tokens_B: torch.Tensor
    mean_chosen_tokens: float


class PreferenceLoss:
    """A loss by name, or a weighted sum of several; calling it returns one number per pair."""

    def __init__(self, *names: str, weights: Sequence[float] | None = None, **knobs: Any) -> None:
        """`weights` belong to `names`, 1 each by default; `knobs` are fields of LossKnobs, such as beta."""
        if unknown := [name for name in names if name not in FORMULAS]:
            raise ValueError(f"loss.name={unknown[0]} is not one of {', '.join(FORMULAS)}")
        self.names = names
        self.knobs = LossKnobs(**knobs)
        self.terms = tuple(zip([1.0] * len(names) if weights is None else weights, names, strict=True))
        self.needs_reference = needs_reference(names)

    @property
    def beta(self) -> float:
        """The scale of implicit rewards."""
        return self.knobs.beta

    def __call__(self, logps: PairLogProbs) -> torch.Tensor:
        """Loss of each pair, fp64 [B], differentiable in the policy's log-probs."""
        u_B, v_B = (divergence_score(ratio_B, self.knobs) for ratio_B in self._ratios(logps))
        terms = PairTerms(
            u_B=u_B,
            v_B=v_B,
            lp_chosen_B=logps.policy.chosen_B,
            lp_rejected_B=logps.policy.rejected_B,
            chosen_tokens_B=logps.chosen_tokens_B,
            rejected_tokens_B=logps.rejected_tokens_B,
            mean_chosen_tokens=logps.mean_chosen_tokens,
        )
        return torch.stack([weight * FORMULAS[name](terms, self.knobs) for weight, name in self.terms]).sum(dim=0)

    def rewards(self, logps: PairLogProbs) -> Responses:
        """Implicit rewards of the chosen and the rejected responses: β·u and β·v, or β·lp/L without a reference."""
        chosen_B, rejected_B = self._ratios(logps)
        if not self.needs_reference:
            chosen_B, rejected_B = chosen_B / logps.chosen_tokens_B, rejected_B / logps.rejected_tokens_B
        return self.beta * chosen_B, self.beta * rejected_B

    def _ratios(self, logps: PairLogProbs) -> Responses:
        """Returns u and v; without a reference, the policy's own log-probs."""
        if not self.needs_reference:
            return logps.policy.chosen_B, logps.policy.rejected_B
        (chosen_B, rejected_B), (reference_chosen_B, reference_rejected_B) = (
            model.with_weighted_tails(self.knobs.ld_alpha) for model in (logps.policy, logps.reference)
        )
        return chosen_B - reference_chosen_B, rejected_B - reference_rejected_B

    @property
    def value_without_preference(self) -> float | None:
        """The loss of a pair for a policy that equals its reference, as in the first step of a fresh run.

        None if it depends on the pair, as with a loss without reference, alone or in a mix.
        """
        if not REFERENCE_FREE.isdisjoint(self.names):
            return None
        zero_B, one_B = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.long)
        model = SequenceLogProbs(zero_B, zero_B, zero_B, zero_B)
        return float(self(PairLogProbs(model, model, one_B, one_B, mean_chosen_tokens=1.0)))

    @property
    def least_value(self) -> float | None:
        """The least loss of a pair of one-token responses with rewards between -20 and 20; None as above.

        Also None if the loss has no minimum in the rewards (robust), or has it at a score of another divergence (ipo).
        Found on a grid of rewards 0.1 apart, on which the targets of the squared losses (ipo, sppo_hard) lie.
        """
        aims_at_a_score = "ipo" in self.names and self.knobs.f_divergence != "reverse_kl"
        if not REFERENCE_FREE.isdisjoint(self.names) or aims_at_a_score:
            return None
        least, further = self._least_within(20.0), self._least_within(40.0)
        return least if least - further < 1e-3 * max(1.0, abs(least)) else None

    def _least_within(self, reward: float) -> float:
        rewards_R = torch.linspace(-reward, reward, round(20 * reward) + 1, dtype=torch.float64)
        chosen_B, rejected_B = torch.cartesian_prod(rewards_R, rewards_R).T / self.beta
        zero_B, one_B = torch.zeros_like(chosen_B), torch.ones_like(chosen_B, dtype=torch.long)
        policy = SequenceLogProbs(chosen_B, rejected_B, zero_B, zero_B)
        reference = SequenceLogProbs(zero_B, zero_B, zero_B, zero_B)
        return float(self(PairLogProbs(policy, reference, one_B, one_B, mean_chosen_tokens=1.0)).min())

    @property
    def aimed_drift(self) -> float:
        """Distance from the reference, in nats per token of either response, at which the loss has its minimum.

        0 for losses without such a target. Per-token ipo has a target margin of 1/(2β) nats per token, half of it for
        each response.
        """
        per_token = "ipo" in self.names and self.knobs.ipo_length_normalize
        return 0.25 / self.beta if per_token else 0.0


def pair_statistics(loss_B: torch.Tensor, rewards: Responses, policy: SequenceLogProbs) -> dict[str, torch.Tensor]:
    """Sums over the B pairs of the metrics in STATISTICS, as fp64 scalars without gradient.

    Accuracies count strictly greater values: a tie is no success.
    """
    with torch.no_grad():
        chosen_B, rejected_B = rewards
        values_B = (
            loss_B,
            chosen_B,
            rejected_B,
            chosen_B > rejected_B,
            chosen_B - rejected_B,
            policy.chosen_B,
            policy.rejected_B,
            policy.chosen_B > policy.rejected_B,
        )
        return {name: value_B.detach().double().sum() for name, value_B in zip(STATISTICS, values_B, strict=True)}


def length_statistics(rewards: Responses, logps: PairLogProbs) -> dict[str, torch.Tensor]:
    """Sums over the B pairs of LENGTHS and LENGTH_PRODUCTS, as fp64 scalars without gradient.

    A gap is the number of tokens of the chosen response minus that of the rejected one.
    """
    with torch.no_grad():
        chosen_B, rejected_B = logps.chosen_tokens_B.double(), logps.rejected_tokens_B.double()
        gap_B, margin_B = chosen_B - rejected_B, (rewards[0] - rewards[1]).detach().double()
        values_B = (chosen_B, rejected_B, gap_B * gap_B, gap_B * margin_B, margin_B * margin_B)
        return {name: value_B.sum() for name, value_B in zip((*LENGTHS, *LENGTH_PRODUCTS), values_B, strict=True)}
