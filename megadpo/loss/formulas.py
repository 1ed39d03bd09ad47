"""The formulas of the losses, per pair. Legend: B pairs; everything is fp64. Notation as in table.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.functional import logsigmoid

# Larger exponents are clamped to it, and keep its slope: exp() stays finite in fp64, and overflows in fp32 visibly.
_LARGEST_EXPONENT = 700.0
# Mean log-probs are clamped to it, fp32's resolution at 1: at 0, a certain response, the odds are infinite.
_NEAREST_TO_CERTAIN = -(2.0**-24)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossKnobs:
    """The hyperparameters of the losses, under the names of their keys in `loss.*`."""

    beta: float
    label_smoothing: float = 0.0
    ipo_length_normalize: bool = True
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    f_divergence: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTerms:
    """The inputs of a formula.

    `u_B` and `v_B` compare policy and reference on the chosen and the rejected response; `lp_chosen_B` and
    `lp_rejected_B` are the policy's own sums over all tokens. `mean_chosen_tokens` is the mean over all pairs of the
    global batch.
    """

    u_B: torch.Tensor
    v_B: torch.Tensor
    lp_chosen_B: torch.Tensor
    lp_rejected_B: torch.Tensor
    chosen_tokens_B: torch.Tensor
    rejected_tokens_B: torch.Tensor
    mean_chosen_tokens: float

    @property
    def d_B(self) -> torch.Tensor:
        """u − v."""
        return self.u_B - self.v_B

    @property
    def per_token_d_B(self) -> torch.Tensor:
        """u/L_w − v/L_l."""
        return self.u_B / self.chosen_tokens_B - self.v_B / self.rejected_tokens_B

    @property
    def mean_logps_B(self) -> tuple[torch.Tensor, torch.Tensor]:
        """lp(w)/L_w and lp(l)/L_l."""
        return self.lp_chosen_B / self.chosen_tokens_B, self.lp_rejected_B / self.rejected_tokens_B


def divergence_score(ratio_B: torch.Tensor, knobs: LossKnobs) -> torch.Tensor:
    """f′ of the probability ratio minus f′(1), which replaces the log-ratio in f-DPO (Wang et al. 2023).

    For the α-divergence it is (tᵅ⁻¹ − 1)/(α − 1) at t = exp(ratio); forward KL is α = 0, reverse KL is α → 1. For
    forward KL and the α-divergence it grows exponentially where the policy's probability of a response vanishes.
    """
    if knobs.f_divergence == "reverse_kl":
        return ratio_B
    if knobs.f_divergence == "js":
        return math.log(2.0) + logsigmoid(ratio_B)
    power = (0.0 if knobs.f_divergence == "forward_kl" else knobs.f_alpha_divergence_coef) - 1.0
    exponent_B = power * ratio_B
    beyond_B = (exponent_B - _LARGEST_EXPONENT).clamp(min=0.0).detach()
    return torch.expm1(exponent_B - beyond_B) / power


def _smoothed(logits_B: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return -(1.0 - label_smoothing) * logsigmoid(logits_B) - label_smoothing * logsigmoid(-logits_B)


def sigmoid(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, eq. 7), with label smoothing cDPO (Mitchell 2023)."""
    return _smoothed(k.beta * t.d_B, k.label_smoothing)


def robust(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """An estimate of DPO's loss that is unbiased under flipped labels (Chowdhury et al. 2024)."""
    x_B, noise = k.beta * t.d_B, k.label_smoothing
    return (-(1.0 - noise) * logsigmoid(x_B) + noise * logsigmoid(-x_B)) / (1.0 - 2.0 * noise)


def ipo(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """Squared distance of the (per-token) margin from 1/(2β) (Azar et al. 2023, eq. 17)."""
    d_B = t.per_token_d_B if k.ipo_length_normalize else t.d_B
    return (d_B - 1.0 / (2.0 * k.beta)) ** 2


def hinge(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """SLiC's hinge on DPO's margin (Zhao et al. 2023; Liu et al. 2024)."""
    return torch.relu(1.0 - k.beta * t.d_B)


def sigmoid_norm(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """DPO on log-ratios per token (Lambert et al. 2024)."""
    return -logsigmoid(k.beta * t.per_token_d_B)


def exo_pair(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """Reverse KL from the policy's choice to labels that are wrong with probability ε (Ji et al. 2024, eq. 16)."""
    x_B, log_p_chosen, log_p_rejected = k.beta * t.d_B, math.log1p(-k.label_smoothing), math.log(k.label_smoothing)
    chosen_B = torch.sigmoid(x_B) * (logsigmoid(x_B) - log_p_chosen)
    return chosen_B + torch.sigmoid(-x_B) * (logsigmoid(-x_B) - log_p_rejected)


def nca_pair(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """Noise-contrastive alignment of two responses (Chen et al. 2024)."""
    chosen_B, rejected_B = k.beta * t.u_B, k.beta * t.v_B
    return -logsigmoid(chosen_B) - 0.5 * (logsigmoid(-chosen_B) + logsigmoid(-rejected_B))


def bco_pair(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """Binary classification of each response by its reward (Jung et al. 2024), without the reward shift δ, as in TRL.

    δ would be a running mean over earlier batches, which is state of the run and not of a pair.
    """
    return -logsigmoid(k.beta * t.u_B) - logsigmoid(-k.beta * t.v_B)


def sppo_hard(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """Squared distances of the log-ratios from ±1/(2β) (Wu et al. 2024, eq. 4.7, with a winning probability of 1)."""
    half = 0.5 / k.beta
    return (t.u_B - half) ** 2 + (t.v_B + half) ** 2


def apo_zero(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """Raises the chosen and lowers the rejected response (D'Oosterlinck et al. 2024, eq. 7)."""
    return 1.0 - torch.sigmoid(k.beta * t.u_B) + torch.sigmoid(k.beta * t.v_B)


def apo_down(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """Lowers the chosen response, and the rejected one further (D'Oosterlinck et al. 2024, eq. 8)."""
    return torch.sigmoid(k.beta * t.u_B) + 1.0 - torch.sigmoid(k.beta * t.d_B)


def discopop(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """A blend of logistic and exponential loss (Lu et al. 2024, eq. 5)."""
    x_B = k.beta * t.d_B
    # One exponent for the product m·exp(−x): its factors overflow long before the product does.
    exponential_B = torch.exp(logsigmoid(x_B / k.discopop_tau) - x_B)
    return exponential_B - torch.sigmoid(-x_B / k.discopop_tau) * logsigmoid(x_B)


def simpo(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """DPO on mean log-probs, with a target margin in place of the reference (Meng et al. 2024, eq. 6)."""
    chosen_B, rejected_B = t.mean_logps_B
    return _smoothed(k.beta * (chosen_B - rejected_B) - k.simpo_gamma, k.label_smoothing)


def orpo(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """NLL per token of the chosen response and β times an odds-ratio loss (Hong et al. 2024, eq. 4, 6 and 7; λ = β)."""
    chosen_B, rejected_B = t.mean_logps_B
    log_odds_B = chosen_B - rejected_B - _log1mexp(chosen_B) + _log1mexp(rejected_B)
    return -chosen_B - k.beta * logsigmoid(log_odds_B)


def _log1mexp(x_B: torch.Tensor) -> torch.Tensor:
    """log(1 − eˣ) for x ≤ 0."""
    return torch.log(-torch.expm1(x_B.clamp(max=_NEAREST_TO_CERTAIN)))


def sft(t: PairTerms, k: LossKnobs) -> torch.Tensor:
    """NLL of the chosen response, scaled so that its mean over pairs is the mean over their tokens."""
    return -t.lp_chosen_B / t.mean_chosen_tokens


FORMULAS: Mapping[str, Callable[[PairTerms, LossKnobs], torch.Tensor]] = MappingProxyType(
    {
        formula.__name__: formula
        for formula in (
            *(sigmoid, robust, ipo, hinge, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard),
            *(apo_zero, apo_down, discopop, simpo, orpo, sft),
        )
    }
)
