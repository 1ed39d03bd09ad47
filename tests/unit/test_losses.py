"""Every loss is its formula, its gradient is right, and what is logged of the pairs means what it says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megadpo.losses import STATISTICS, PairLogProbs, PreferenceLoss, ipo_loss, pair_statistics, sigmoid_loss

# (policy chosen, policy rejected, reference chosen, reference rejected, chosen tokens, rejected tokens)
PAIRS = [
    (-12.5, -20.25, -14.0, -19.5, 7, 11),  # better than the reference on both sides
    (-31.0, -8.0, -25.5, -9.75, 40, 3),  # worse on both sides
    (-4000.125, -3999.5, -4000.0, -4000.0, 900, 1000),
    (-5.0, -5.0, -5.0, -5.0, 1, 1),  # no preference
    (-2.0, -900.0, -400.0, -3.0, 2, 300),  # so far that the sigmoid saturates
]


def log_probs(pairs: list[tuple[float, ...]] = PAIRS, *, requires_grad: bool = False) -> PairLogProbs:
    *scores, chosen_tokens, rejected_tokens = zip(*pairs, strict=True)
    policy_and_reference = [torch.tensor(column, dtype=torch.float64) for column in scores]
    for policy_B in policy_and_reference[:2]:
        policy_B.requires_grad_(requires_grad)
    return PairLogProbs(*policy_and_reference, torch.tensor(chosen_tokens), torch.tensor(rejected_tokens))


def swapped(logps: PairLogProbs) -> PairLogProbs:
    return PairLogProbs(
        logps.policy_rejected_B,
        logps.policy_chosen_B,
        logps.reference_rejected_B,
        logps.reference_chosen_B,
        logps.rejected_tokens_B,
        logps.chosen_tokens_B,
    )


def softplus(x: float) -> float:
    """−log σ(−x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def dpo(beta: float, smoothing: float) -> Callable[..., float]:
    def formula(pc: float, pr: float, rc: float, rr: float, chosen_tokens: int, rejected_tokens: int) -> float:
        margin = beta * ((pc - pr) - (rc - rr))
        return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)

    return formula


def ipo(beta: float, *, per_token: bool) -> Callable[..., float]:
    def formula(pc: float, pr: float, rc: float, rr: float, chosen_tokens: int, rejected_tokens: int) -> float:
        lengths = (chosen_tokens, rejected_tokens) if per_token else (1, 1)
        return ((pc - rc) / lengths[0] - (pr - rr) / lengths[1] - 1 / (2 * beta)) ** 2

    return formula


LOSSES = {
    "dpo": (PreferenceLoss("sigmoid", beta=0.1), dpo(0.1, 0.0)),
    "dpo, larger beta": (PreferenceLoss("sigmoid", beta=0.7), dpo(0.7, 0.0)),
    "cdpo": (PreferenceLoss("sigmoid", beta=0.1, label_smoothing=0.2), dpo(0.1, 0.2)),
    "ipo": (PreferenceLoss("ipo", beta=0.3), ipo(0.3, per_token=True)),
    "ipo of the paper": (
        PreferenceLoss("ipo", beta=0.3, ipo_length_normalize=False),
        ipo(0.3, per_token=False),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_is_its_formula(name: str) -> None:
    loss, formula = LOSSES[name]
    loss_B = loss(log_probs())
    assert loss_B.dtype is torch.float64
    expected_B = torch.tensor([formula(*pair) for pair in PAIRS], dtype=torch.float64)
    torch.testing.assert_close(loss_B, expected_B, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str) -> None:
    loss, _ = LOSSES[name]
    fixed = log_probs(PAIRS[:4])

    def of_policy(chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
        return loss(
            PairLogProbs(
                chosen_B,
                rejected_B,
                fixed.reference_chosen_B,
                fixed.reference_rejected_B,
                fixed.chosen_tokens_B,
                fixed.rejected_tokens_B,
            )
        )

    policy = (fixed.policy_chosen_B.requires_grad_(), fixed.policy_rejected_B.requires_grad_())
    assert torch.autograd.gradcheck(of_policy, policy)


def test_dpo_gradient_by_hand() -> None:
    """∂/∂lp(chosen) = −β·σ(−βd), and the opposite for rejected (Rafailov et al., section 4)."""
    logps = log_probs(requires_grad=True)
    sigmoid_loss(logps, beta=0.1).sum().backward()
    margin_B = 0.1 * (logps.chosen_ratio_B - logps.rejected_ratio_B).detach()
    expected_B = -0.1 / (1 + margin_B.exp())
    torch.testing.assert_close(logps.policy_chosen_B.grad, expected_B, rtol=1e-12, atol=0)
    torch.testing.assert_close(logps.policy_rejected_B.grad, -expected_B, rtol=1e-12, atol=0)


def test_half_the_labels_flipped_is_symmetric() -> None:
    logps = log_probs()
    kwargs = {"beta": 0.1, "label_smoothing": 0.5}
    torch.testing.assert_close(sigmoid_loss(logps, **kwargs), sigmoid_loss(swapped(logps), **kwargs))


def test_smoothing_weighs_the_loss_of_the_flipped_label() -> None:
    logps = log_probs()
    kept_B, flipped_B = sigmoid_loss(logps, beta=0.1), sigmoid_loss(swapped(logps), beta=0.1)
    smoothed_B = sigmoid_loss(logps, beta=0.1, label_smoothing=0.3)
    torch.testing.assert_close(smoothed_B, 0.7 * kept_B + 0.3 * flipped_B, rtol=1e-12, atol=1e-12)


def test_ipo_is_per_token_unless_told_otherwise() -> None:
    logps = log_probs()
    assert torch.equal(ipo_loss(logps, beta=0.3), ipo_loss(logps, beta=0.3, length_normalize=True))
    assert not torch.allclose(ipo_loss(logps, beta=0.3), ipo_loss(logps, beta=0.3, length_normalize=False))


@pytest.mark.parametrize("name", LOSSES)
def test_value_without_preference(name: str) -> None:
    """The number that the first step is held to is the loss of a policy that equals its reference."""
    loss, _ = LOSSES[name]
    equal = [(-12.5, -700.25, -12.5, -700.25, 7, 300), (-3.0, -1.0, -3.0, -1.0, 1, 2)]
    for value in loss(log_probs(equal)).tolist():
        assert value == pytest.approx(loss.value_without_preference, rel=1e-15)
    if loss.name == "sigmoid":
        assert loss.value_without_preference == math.log(2)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.name=hinge is not one of sigmoid, ipo"):
        PreferenceLoss("hinge", beta=0.1)(log_probs())


def test_statistics_are_sums_under_trl_names() -> None:
    loss, formula = LOSSES["dpo"]
    logps = log_probs()
    sums = pair_statistics(loss(logps), logps, beta=loss.beta)
    assert tuple(sums) == STATISTICS
    rewards = [(0.1 * (pc - rc), 0.1 * (pr - rr)) for pc, pr, rc, rr, _, _ in PAIRS]
    expected = {
        "loss": sum(formula(*pair) for pair in PAIRS),
        "rewards/chosen": sum(chosen for chosen, _ in rewards),
        "rewards/rejected": sum(rejected for _, rejected in rewards),
        "rewards/accuracies": 2,  # of five: one tie, and two pairs the wrong way round
        "rewards/margins": sum(chosen - rejected for chosen, rejected in rewards),
        "logps/chosen": sum(pair[0] for pair in PAIRS),
        "logps/rejected": sum(pair[1] for pair in PAIRS),
        "logps/accuracies": 2,  # the first and the last
    }
    for name, value in expected.items():
        assert sums[name].dtype is torch.float64
        assert sums[name].shape == ()
        assert float(sums[name]) == pytest.approx(value, rel=1e-12), name


def test_a_tie_is_no_success() -> None:
    logps = log_probs([(-5.0, -5.0, -6.0, -6.0, 1, 1)])
    sums = pair_statistics(sigmoid_loss(logps, beta=0.1), logps, beta=0.1)
    assert float(sums["rewards/accuracies"]) == float(sums["logps/accuracies"]) == 0.0


def test_swapping_chosen_and_rejected_mirrors_what_is_logged() -> None:
    logps = log_probs()
    there = pair_statistics(sigmoid_loss(logps, beta=0.1), logps, beta=0.1)
    back = pair_statistics(sigmoid_loss(swapped(logps), beta=0.1), swapped(logps), beta=0.1)
    assert there["rewards/chosen"] == back["rewards/rejected"]
    assert there["rewards/rejected"] == back["rewards/chosen"]
    assert there["rewards/margins"] == -back["rewards/margins"]
    assert there["logps/chosen"] == back["logps/rejected"]
    assert there["rewards/accuracies"] + back["rewards/accuracies"] == len(PAIRS) - 1  # the tie counts on neither side


def test_statistics_carry_no_gradient() -> None:
    logps = log_probs(requires_grad=True)
    sums = pair_statistics(sigmoid_loss(logps, beta=0.1), logps, beta=0.1)
    assert not any(value.requires_grad for value in sums.values())


def test_a_filler_without_pairs_adds_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    logps = PairLogProbs(nothing, nothing, nothing, nothing, nothing.long(), nothing.long())
    for loss, _ in LOSSES.values():
        loss_B = loss(logps)
        assert float(loss_B.sum()) == 0.0
        assert [float(v) for v in pair_statistics(loss_B, logps, beta=0.1).values()] == [0.0] * len(STATISTICS)
