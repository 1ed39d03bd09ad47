"""Preference losses: pure functions of per-pair log-probs. Legend: B pairs; log-probs and losses are fp64.

Notation of the papers: u = lp_policy(chosen) − lp_reference(chosen), v the same for rejected, d = u − v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

# What is logged of every pair; TRL's metric names.
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
# What may be logged of every response token, TRL's metric names, and the count of the tokens that each is a mean over:
# the entropy of all of them, the share of the chosen ones that are the policy's first choice.
TOKEN_STATISTICS = {"entropy": "response_tokens", "mean_token_accuracy": "chosen_tokens"}
# Everything that is summed up over ranks and steps.
SUMS = (*STATISTICS, "pairs", *TOKEN_STATISTICS, *TOKEN_STATISTICS.values())


@dataclass(frozen=True, slots=True)
class PairLogProbs:
    """Summed response log-probs (nats) of B pairs under policy and reference, and the response lengths in tokens."""

    policy_chosen_B: torch.Tensor
    policy_rejected_B: torch.Tensor
    reference_chosen_B: torch.Tensor
    reference_rejected_B: torch.Tensor
    chosen_tokens_B: torch.Tensor
    rejected_tokens_B: torch.Tensor

    @property
    def chosen_ratio_B(self) -> torch.Tensor:
        """u: log-ratio of the chosen responses."""
        return self.policy_chosen_B - self.reference_chosen_B

    @property
    def rejected_ratio_B(self) -> torch.Tensor:
        """v: log-ratio of the rejected responses."""
        return self.policy_rejected_B - self.reference_rejected_B


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """A loss by name with its knobs; calling it gives one loss per pair."""

    name: str
    beta: float
    label_smoothing: float = 0.0
    ipo_length_normalize: bool = True

    def __call__(self, logps: PairLogProbs) -> torch.Tensor:
        """Loss of each pair, fp64 [B], differentiable in the policy's log-probs."""
        if self.name == "sigmoid":
            return sigmoid_loss(logps, beta=self.beta, label_smoothing=self.label_smoothing)
        if self.name == "ipo":
            return ipo_loss(logps, beta=self.beta, length_normalize=self.ipo_length_normalize)
        raise ValueError(f"loss.name={self.name} is not one of sigmoid, ipo")

    @property
    def value_without_preference(self) -> float:
        """The loss of a pair whose policy equals its reference: what the first step of a fresh run must show."""
        zero_B, one_B = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.long)
        return float(self(PairLogProbs(zero_B, zero_B, zero_B, zero_B, one_B, one_B)))


def sigmoid_loss(logps: PairLogProbs, *, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """−(1−ε)·log σ(βd) − ε·log σ(−βd): DPO (Rafailov et al. 2023, eq. 7), with ε > 0 cDPO (Mitchell 2023)."""
    scaled_B = beta * (logps.chosen_ratio_B - logps.rejected_ratio_B)
    return -(1.0 - label_smoothing) * logsigmoid(scaled_B) - label_smoothing * logsigmoid(-scaled_B)


def ipo_loss(logps: PairLogProbs, *, beta: float, length_normalize: bool = True) -> torch.Tensor:
    """(u/L_w − v/L_l − 1/(2β))², or (d − 1/(2β))² without length normalisation (Azar et al. 2023, eq. 17)."""
    chosen_B, rejected_B = logps.chosen_ratio_B, logps.rejected_ratio_B
    if length_normalize:
        chosen_B = chosen_B / logps.chosen_tokens_B
        rejected_B = rejected_B / logps.rejected_tokens_B
    return (chosen_B - rejected_B - 1.0 / (2.0 * beta)) ** 2


def pair_statistics(loss_B: torch.Tensor, logps: PairLogProbs, *, beta: float) -> dict[str, torch.Tensor]:
    """Sums over the B pairs of what is logged, as fp64 scalars without gradient under the names of STATISTICS.

    Accuracies count strictly greater: a pair that the policy cannot tell apart is not a success.
    """
    with torch.no_grad():
        chosen_B, rejected_B = beta * logps.chosen_ratio_B, beta * logps.rejected_ratio_B
        values_B = (
            loss_B.detach(),
            chosen_B,
            rejected_B,
            chosen_B > rejected_B,
            chosen_B - rejected_B,
            logps.policy_chosen_B,
            logps.policy_rejected_B,
            logps.policy_chosen_B > logps.policy_rejected_B,
        )
        return {name: value_B.double().sum() for name, value_B in zip(STATISTICS, values_B, strict=True)}
