"""Every loss is its formula, its gradient is right, each key has its effect, and what is logged means what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.config.choices import FDivergence, LossName
from megadpo.config.schema import LossConfig
from megadpo.loss.formulas import FORMULAS, LossKnobs, divergence_score
from megadpo.loss.preference import (
    LENGTH_PRODUCTS,
    LENGTHS,
    STATISTICS,
    PairLogProbs,
    PreferenceLoss,
    SequenceLogProbs,
    length_statistics,
    pair_statistics,
)
from megadpo.loss.table import LOSSES, NOT_OFFERED, REFERENCE_FREE, needs_reference
from tests.helpers.loss_cases import CASES, LossCase

DOCS = Path(__file__).parents[3] / "docs" / "numerics.md"

# (policy chosen, policy rejected, reference chosen, reference rejected, chosen tokens, rejected tokens)
PAIRS = [
    (-12.5, -20.25, -14.0, -19.5, 7, 11),  # better than the reference on both sides
    (-31.0, -8.0, -25.5, -9.75, 40, 3),  # worse on both sides
    (-4000.125, -3999.5, -4000.0, -4000.0, 900, 1000),
    (-5.0, -5.0, -5.0, -5.0, 1, 1),  # no preference
    (-2.0, -900.0, -400.0, -3.0, 2, 300),  # so far that the sigmoid saturates
]
# Sums over the tokens beyond the shorter response's length, in the order of the four sums above.
TAILS = [
    (0.0, -4.5, 0.0, -4.25),
    (-28.5, 0.0, -20.0, 0.0),
    (0.0, -400.0, 0.0, -401.0),
    (0.0,) * 4,
    (0.0, -890.0, 0, -2),
]
MEAN_CHOSEN_TOKENS = 190.0

Pair = tuple[float, ...]
EQUAL = [(-12.5, -700.25, -12.5, -700.25, 7, 300), (-3.0, -1.0, -3.0, -1.0, 1, 2)]


def log_probs(pairs: list[Pair] = PAIRS, tails: list[Pair] = TAILS, *, requires_grad: bool = False) -> PairLogProbs:
    *sums, chosen_tokens, rejected_tokens = zip(*pairs, strict=True)
    policy_and_reference = [torch.tensor(column, dtype=torch.float64) for column in sums]
    for policy_B in policy_and_reference[:2]:
        policy_B.requires_grad_(requires_grad)
    pc, pr, rc, rr = policy_and_reference
    tpc, tpr, trc, trr = (torch.tensor(column, dtype=torch.float64) for column in zip(*tails, strict=True))
    return PairLogProbs(
        SequenceLogProbs(pc, pr, tpc, tpr),
        SequenceLogProbs(rc, rr, trc, trr),
        torch.tensor(chosen_tokens),
        torch.tensor(rejected_tokens),
        MEAN_CHOSEN_TOKENS,
    )


def swapped(logps: PairLogProbs) -> PairLogProbs:
    policy, reference = (
        SequenceLogProbs(m.rejected_B, m.chosen_B, m.rejected_tail_B, m.chosen_tail_B)
        for m in (logps.policy, logps.reference)
    )
    return replace(
        logps,
        policy=policy,
        reference=reference,
        chosen_tokens_B=logps.rejected_tokens_B,
        rejected_tokens_B=logps.chosen_tokens_B,
    )


def sums_logged(loss: PreferenceLoss, logps: PairLogProbs) -> dict[str, torch.Tensor]:
    return pair_statistics(loss(logps), loss.rewards(logps), logps.policy)


# Formulas in plain numbers


def ls(x: float) -> float:
    """log σ(x), without overflow."""
    return -max(-x, 0.0) - math.log1p(math.exp(-abs(x)))


def sg(x: float) -> float:
    return math.exp(ls(x))


def score(ratio: float, knobs: LossKnobs) -> float:
    """f′(t) − f′(1) of the ratio t = exp(ratio)."""
    alpha = knobs.f_alpha_divergence_coef
    return {
        "reverse_kl": lambda: ratio,
        "forward_kl": lambda: 1.0 - math.exp(min(-ratio, 700.0)),
        "js": lambda: math.log(2.0) + ls(ratio),
        "alpha": lambda: (math.exp(min((alpha - 1.0) * ratio, 700.0)) - 1.0) / (alpha - 1.0),
    }[knobs.f_divergence]()


def smoothed(x: float, e: float) -> float:
    return -(1 - e) * ls(x) - e * ls(-x)


def log_odds(x: float) -> float:
    return x - math.log(1.0 - math.exp(x))


def by_hand(name: str, k: LossKnobs, pair: Pair, tail: Pair) -> float:
    """The formula of the table in docs/numerics.md."""
    alpha = 1.0 if k.ld_alpha is None else k.ld_alpha
    chosen, rejected, reference_chosen, reference_rejected = (
        total - t + alpha * t for total, t in zip(pair[:4], tail, strict=True)
    )
    L_w, L_l = pair[4:]
    u, v = score(chosen - reference_chosen, k), score(rejected - reference_rejected, k)
    b, e, d = k.beta, k.label_smoothing, u - v
    half, m_w, m_l = 1 / (2 * b), pair[0] / L_w, pair[1] / L_l
    m = sg(b * d / k.discopop_tau)
    formulas: dict[str, Callable[[], float]] = {
        "sigmoid": lambda: smoothed(b * d, e),
        "robust": lambda: (-(1 - e) * ls(b * d) + e * ls(-b * d)) / (1 - 2 * e),
        "ipo": lambda: ((u / L_w - v / L_l if k.ipo_length_normalize else d) - half) ** 2,
        "hinge": lambda: max(0.0, 1 - b * d),
        "sigmoid_norm": lambda: -ls(b * (u / L_w - v / L_l)),
        "exo_pair": lambda: sg(b * d) * (ls(b * d) - math.log(1 - e)) + sg(-b * d) * (ls(-b * d) - math.log(e)),
        "nca_pair": lambda: -ls(b * u) - (ls(-b * u) + ls(-b * v)) / 2,
        "bco_pair": lambda: -ls(b * u) - ls(-b * v),
        "sppo_hard": lambda: (u - half) ** 2 + (v + half) ** 2,
        "apo_zero": lambda: 1 - sg(b * u) + sg(b * v),
        "apo_down": lambda: sg(b * u) + 1 - sg(b * d),
        "discopop": lambda: -(1 - m) * ls(b * d) + m * math.exp(-b * d),
        "simpo": lambda: smoothed(b * (m_w - m_l) - k.simpo_gamma, e),
        "orpo": lambda: -m_w - b * ls(log_odds(m_w) - log_odds(m_l)),
        "sft": lambda: -pair[0] / MEAN_CHOSEN_TOKENS,
    }
    return formulas[name]()


def mixed_by_hand(case: LossCase, pair: Pair, tail: Pair) -> float:
    knobs = LossKnobs(**{name: value for name, value in case.knobs.items() if name != "weights"})
    weights = case.knobs.get("weights", [1.0] * len(case.names))
    return sum(w * by_hand(name, knobs, pair, tail) for w, name in zip(weights, case.names, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_is_its_formula(name: str) -> None:
    assert_is_its_formula(CASES[name], PAIRS, TAILS)


@pytest.mark.parametrize("name", LOSSES)
def test_is_its_formula_with_every_divergence_and_tail_weight(name: str) -> None:
    """On pairs whose log-ratios have an exponential."""
    read = LOSSES[name].knobs
    divergences = list(FDivergence) if "f_divergence" in read else [FDivergence.reverse_kl]
    for divergence in map(str, divergences):
        for ld_alpha in (None, 0.0, 0.7) if "ld_alpha" in read else (None,):
            case = replace_knob(replace_knob(CASES[name], "f_divergence", divergence), "ld_alpha", ld_alpha)
            assert_is_its_formula(case, [*PAIRS[:2], PAIRS[3]], [*TAILS[:2], TAILS[3]])


def assert_is_its_formula(case: LossCase, pairs: list[Pair], tails: list[Pair]) -> None:
    loss_B = case.loss()(log_probs(pairs, tails))
    assert loss_B.dtype is torch.float64
    expected = [mixed_by_hand(case, pair, tail) for pair, tail in zip(pairs, tails, strict=True)]
    torch.testing.assert_close(loss_B, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str) -> None:
    """Autograd's derivatives are the formula's slopes, tails included."""
    loss, fixed = CASES[name].loss(), log_probs(PAIRS[:4], TAILS[:4])

    def of_policy(*policy: torch.Tensor) -> torch.Tensor:
        return loss(replace(fixed, policy=SequenceLogProbs(*policy)))

    model = fixed.policy
    policy = (model.chosen_B, model.rejected_B, model.chosen_tail_B, model.rejected_tail_B)
    assert torch.autograd.gradcheck(of_policy, tuple(values_B.requires_grad_() for values_B in policy))


def test_dpo_gradient_by_hand() -> None:
    """∂/∂lp(chosen) = −β·σ(−βd), and the opposite for rejected (Rafailov et al., section 4)."""
    logps = log_probs(requires_grad=True)
    PreferenceLoss("sigmoid", beta=0.1)(logps).sum().backward()
    margin_B = torch.tensor([0.1 * ((pc - rc) - (pr - rr)) for pc, pr, rc, rr, _, _ in PAIRS], dtype=torch.float64)
    expected_B = -0.1 / (1 + margin_B.exp())
    torch.testing.assert_close(logps.policy.chosen_B.grad, expected_B, rtol=1e-12, atol=0)
    torch.testing.assert_close(logps.policy.rejected_B.grad, -expected_B, rtol=1e-12, atol=0)


FAR = [(-9000.0, -10.0, -10.0, -9000.0, 300, 300), (-10.0, -9000.0, -9000.0, -10.0, 300, 300)]
CERTAIN = [(0.0, -3.0, 0.0, -3.0, 1, 1), (-3.0, 0.0, -3.0, 0.0, 1, 1), (0.0, 0.0, 0.0, 0.0, 1, 1)]


def losses_and_slopes(case: LossCase, pairs: list[Pair]) -> list[torch.Tensor]:
    logps = log_probs(pairs, [(0.0,) * 4] * len(pairs), requires_grad=True)
    loss_B = replace_knob(case, "beta", 1.0).loss()(logps)
    policy = (logps.policy.chosen_B, logps.policy.rejected_B)
    return [
        loss_B,
        *(slope for slope in torch.autograd.grad(loss_B.sum(), policy, allow_unused=True) if slope is not None),
    ]


@pytest.mark.parametrize("pairs", [FAR, CERTAIN], ids=["far", "certain"])
@pytest.mark.parametrize("name", LOSSES)
def test_at_the_ends_losses_and_slopes_are_finite(name: str, pairs: list[Pair]) -> None:
    """Where factors of a formula run out of fp64's range, or a response is certain."""
    assert all(values_B.isfinite().all() for values_B in losses_and_slopes(CASES[name], pairs))


@pytest.mark.parametrize("name", ["forward kl", "alpha"])
def test_exponentials_are_never_cut_off(name: str) -> None:
    """The pair that the policy has lost has a slope that no fp32 holds, so that the run stops."""
    loss_B, *slopes = losses_and_slopes(CASES[name], FAR)
    assert loss_B.isfinite().all() and all(slope_B.isfinite().all() for slope_B in slopes)
    (lost, won), _ = slopes[0].tolist(), slopes[1].tolist()
    assert -lost > torch.finfo(torch.float32).max and won == 0.0


# What the table says


# The texts of `without_preference`, in numbers.
VALUES: dict[str, Callable[[LossKnobs], float]] = {
    "ln 2": lambda k: math.log(2),
    "2 ln 2": lambda k: 2 * math.log(2),
    "1": lambda k: 1.0,
    "(1/(2β))²": lambda k: (0.5 / k.beta) ** 2,
    "2 (1/(2β))²": lambda k: 2 * (0.5 / k.beta) ** 2,
    "(ln 2 + 1)/2": lambda k: (math.log(2) + 1) / 2,
    "−ln 2 − (ln(1−ε) + ln ε)/2": lambda k: (
        -math.log(2) - (math.log(1 - k.label_smoothing) + math.log(k.label_smoothing)) / 2
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_without_preference(name: str) -> None:
    """What the first step is held to is the loss of a policy that equals its reference; None where the data decide."""
    case, loss = CASES[name], CASES[name].loss()
    values = loss(log_probs(EQUAL, [(0.0, -3.0, 0.0, -3.0), (0.0, -0.5, 0.0, -0.5)])).tolist()
    texts = [LOSSES[part].without_preference for part in case.names]
    if None in texts:
        assert loss.value_without_preference is None
        assert values[0] != pytest.approx(values[1], rel=1e-3)
        return
    weights = case.knobs.get("weights", [1.0] * len(texts))
    expected = sum(w * VALUES[str(text)](loss.knobs) for w, text in zip(weights, texts, strict=True))
    assert [*values, loss.value_without_preference] == pytest.approx([expected] * 3, rel=1e-12)


def test_dpo_starts_at_ln_2() -> None:
    assert PreferenceLoss("sigmoid", beta=0.3).value_without_preference == math.log(2)


def test_names_are_the_same_everywhere() -> None:
    assert [str(name) for name in LossName] == list(LOSSES) == list(FORMULAS)
    assert set(LOSSES) <= set(CASES) and not set(LOSSES) & set(NOT_OFFERED)


def test_defaults_are_those_of_the_configuration() -> None:
    knobs, keys = LossKnobs(beta=0.1), LossConfig()
    assert {item.name: getattr(knobs, item.name) for item in fields(knobs)} == {
        item.name: getattr(keys, item.name) for item in fields(keys) if item.name not in ("name", "weights")
    }
    assert {knob for spec in LOSSES.values() for knob in spec.knobs} == {
        item.name
        for item in fields(knobs)
        if item.name != "f_alpha_divergence_coef"  # goes with f_divergence
    }


OTHER_VALUES = {
    "beta": 0.37,
    "label_smoothing": 0.23,
    "ipo_length_normalize": False,
    "discopop_tau": 0.2,
    "simpo_gamma": 0.9,
    "f_divergence": "js",
    "ld_alpha": 0.4,
}


def replace_knob(case: LossCase, knob: str, value: Any) -> LossCase:
    return LossCase(case.names, case.knobs | {knob: value})


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_the_knobs_of_the_table_and_no_others(name: str) -> None:
    """Others are refused in the configuration, because they would have no effect."""
    logps, before_B = log_probs(), CASES[name].loss()(log_probs())
    # It would change losses of one response's reward too, and is refused there for another reason.
    skipped = {"f_divergence"} if "f_divergence" not in LOSSES[name].knobs and LOSSES[name].needs_reference else set()
    changed = {
        knob
        for knob, value in OTHER_VALUES.items()
        if knob not in skipped and not torch.equal(replace_knob(CASES[name], knob, value).loss()(logps), before_B)
    }
    assert changed == set(LOSSES[name].knobs)


def test_losses_without_a_reference_never_look_at_one() -> None:
    logps = log_probs()
    for name in LOSSES:
        loss, other = CASES[name].loss(), replace(logps, reference=logps.policy)
        assert loss.needs_reference == needs_reference([name]) == (name not in REFERENCE_FREE)
        assert torch.equal(loss(other), loss(logps)) != loss.needs_reference
    assert needs_reference(["simpo", "sigmoid"]) and not needs_reference(["simpo", "sft"])


def test_the_documented_table_is_the_table() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    expected = [
        f"| `{name}` | {spec.formula} | {spec.without_preference or '—'} "
        f"| {', '.join(f'`{knob}`' for knob in spec.knobs) or '—'} | {spec.source} |"
        for name, spec in LOSSES.items()
    ]
    start = rows.index(expected[0])
    assert rows[start : start + len(expected)] == expected


# Mixes and knobs


def test_a_mix_is_the_weighted_sum() -> None:
    logps = log_probs()
    parts = [PreferenceLoss(name, beta=0.1)(logps) for name in ("sigmoid", "nca_pair", "sft")]
    mix = PreferenceLoss("sigmoid", "nca_pair", "sft", beta=0.1, weights=[0.8, 2.0, 0.25])
    torch.testing.assert_close(mix(logps), 0.8 * parts[0] + 2.0 * parts[1] + 0.25 * parts[2], rtol=1e-13, atol=0)
    assert torch.equal(PreferenceLoss("sigmoid", "nca_pair", beta=0.1)(logps), parts[0] + parts[1])


def test_smoothing_weighs_the_loss_of_the_flipped_label() -> None:
    kept_B, flipped_B = (PreferenceLoss("sigmoid", beta=0.1)(logps) for logps in (log_probs(), swapped(log_probs())))
    smoothed_B = PreferenceLoss("sigmoid", beta=0.1, label_smoothing=0.3)(log_probs())
    torch.testing.assert_close(smoothed_B, 0.7 * kept_B + 0.3 * flipped_B, rtol=1e-12, atol=1e-12)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """Chowdhury et al.: its mean over labels that are flipped with probability ε is DPO's loss."""
    robust = PreferenceLoss("robust", beta=0.1, label_smoothing=0.2)
    mean_B = 0.8 * robust(log_probs()) + 0.2 * robust(swapped(log_probs()))
    torch.testing.assert_close(mean_B, PreferenceLoss("sigmoid", beta=0.1)(log_probs()), rtol=1e-9, atol=1e-12)


def test_divergences_meet() -> None:
    """α near 0 is forward KL, near 1 reverse KL; all are 0 at the reference, with slope 1, Jensen-Shannon's 1/2."""
    ratio_B = torch.tensor([-2.0, -0.1, 0.0, 0.7, 3.0], dtype=torch.float64)

    def of(divergence: str, alpha: float = 0.5) -> torch.Tensor:
        knobs = LossKnobs(beta=0.1, f_divergence=divergence, f_alpha_divergence_coef=alpha)
        return divergence_score(ratio_B, knobs)

    torch.testing.assert_close(of("alpha", 1e-9), of("forward_kl"), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(of("alpha", 1 - 1e-7), of("reverse_kl"), rtol=1e-6, atol=1e-9)
    for divergence in FDivergence:
        knobs = LossKnobs(beta=0.1, f_divergence=str(divergence))
        at_reference = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        value = divergence_score(at_reference, knobs)
        value.backward()
        assert float(value.detach()) == pytest.approx(0.0, abs=1e-16)
        assert float(at_reference.grad) == (0.5 if divergence == "js" else 1.0)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.name=dpo is not one of sigmoid, robust, ipo, "):
        PreferenceLoss("dpo", beta=0.1)


# What is logged


def test_statistics_are_sums_under_trl_names() -> None:
    loss, logps = PreferenceLoss("sigmoid", beta=0.1), log_probs()
    sums = sums_logged(loss, logps)
    assert tuple(sums) == STATISTICS
    rewards = [(0.1 * (pc - rc), 0.1 * (pr - rr)) for pc, pr, rc, rr, _, _ in PAIRS]
    expected = {
        "loss": sum(by_hand("sigmoid", loss.knobs, *both) for both in zip(PAIRS, TAILS, strict=True)),
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


def test_rewards_weigh_tails_and_log_probs_do_not() -> None:
    plain, weighed = (sums_logged(CASES[name].loss(), log_probs()) for name in ("sigmoid", "ld"))
    assert all(plain[name] == weighed[name] for name in ("logps/chosen", "logps/rejected", "logps/accuracies"))
    expected = sum(0.1 * (p[1] - 0.7 * t[1] - (p[3] - 0.7 * t[3])) for p, t in zip(PAIRS, TAILS, strict=True))
    assert float(weighed["rewards/rejected"]) == pytest.approx(expected, rel=1e-12) != float(plain["rewards/rejected"])


@pytest.mark.parametrize("name", ["simpo", "orpo", "sft", "simpo with sft"])
def test_rewards_without_a_reference_are_mean_log_probs(name: str) -> None:
    loss = CASES[name].loss()
    sums = sums_logged(loss, log_probs())
    assert float(sums["rewards/chosen"]) == pytest.approx(sum(loss.beta * pair[0] / pair[4] for pair in PAIRS))
    assert float(sums["logps/chosen"]) == sum(pair[0] for pair in PAIRS)


def test_a_tie_is_no_success() -> None:
    sums = sums_logged(PreferenceLoss("sigmoid", beta=0.1), log_probs([(-5.0, -5.0, -6.0, -6.0, 1, 1)], [(0.0,) * 4]))
    assert float(sums["rewards/accuracies"]) == float(sums["logps/accuracies"]) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_swapping_chosen_and_rejected_mirrors_what_is_logged(name: str) -> None:
    loss = CASES[name].loss()
    there, back = (sums_logged(loss, logps) for logps in (log_probs(), swapped(log_probs())))
    assert there["rewards/chosen"] == back["rewards/rejected"]
    assert there["rewards/rejected"] == back["rewards/chosen"]
    assert there["rewards/margins"] == -back["rewards/margins"]
    assert there["logps/chosen"] == back["logps/rejected"]
    assert there["rewards/accuracies"] + back["rewards/accuracies"] == len(PAIRS) - 1  # the tie counts on neither side


def test_statistics_carry_no_gradient() -> None:
    sums = sums_logged(PreferenceLoss("sigmoid", beta=0.1), log_probs(requires_grad=True))
    assert not any(value.requires_grad for value in sums.values())


def test_a_filler_without_pairs_adds_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    model = SequenceLogProbs(nothing, nothing, nothing, nothing)
    logps = PairLogProbs(model, model, nothing.long(), nothing.long(), 10.0)
    for case in CASES.values():
        assert [float(value) for value in sums_logged(case.loss(), logps).values()] == [0.0] * len(STATISTICS)


def test_length_statistics_are_sums_over_pairs() -> None:
    loss, logps = PreferenceLoss("sigmoid", beta=0.1), log_probs(requires_grad=True)
    sums = length_statistics(loss.rewards(logps), logps)
    gaps = [pair[4] - pair[5] for pair in PAIRS]
    margins = [0.1 * (pc - rc - pr + rr) for pc, pr, rc, rr, _, _ in PAIRS]
    expected = [
        *(sum(pair[4] for pair in PAIRS), sum(pair[5] for pair in PAIRS), sum(gap * gap for gap in gaps)),
        *(sum(g * m for g, m in zip(gaps, margins, strict=True)), sum(margin * margin for margin in margins)),
    ]
    assert tuple(sums) == (*LENGTHS, *LENGTH_PRODUCTS)
    assert [float(value) for value in sums.values()] == pytest.approx(expected, rel=1e-12)
    assert {(value.dtype, value.requires_grad) for value in sums.values()} == {(torch.float64, False)}


@pytest.mark.parametrize(
    ("name", "knobs", "expected"),
    [
        *((name, {}, 0.0) for name in ("sigmoid", "ipo", "hinge", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
        # The entropy of the smoothed labels.
        ("sigmoid", {"label_smoothing": 0.1}, -0.9 * math.log(0.9) - 0.1 * math.log(0.1)),
        ("exo_pair", {"label_smoothing": 0.1}, 0.0),
    ],
)
def test_least_value_is_what_no_margin_goes_below(name: str, knobs: dict[str, float], expected: float) -> None:
    for beta in (0.05, 0.5):
        loss = PreferenceLoss(name, beta=beta, **knobs)
        assert loss.value_without_preference is not None
        assert loss.least_value == pytest.approx(expected, abs=1e-3 * loss.value_without_preference)


@pytest.mark.parametrize("names", [("simpo",), ("sigmoid", "sft")])
def test_no_least_value_is_known_without_a_reference(names: tuple[str, ...]) -> None:
    assert PreferenceLoss(*names, beta=0.1).least_value is None


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("robust", {"label_smoothing": 0.1}),  # falls with the margin without end
        ("ipo", {"f_divergence": "js"}),
        ("ipo", {"f_divergence": "forward_kl"}),
    ],
)
def test_no_least_value_is_known_where_there_is_none_or_where_it_is_off_the_grid(
    name: str, knobs: dict[str, Any]
) -> None:
    assert PreferenceLoss(name, beta=0.1, **knobs).least_value is None
    assert PreferenceLoss("sigmoid", name, beta=0.1, **knobs).least_value is None


def test_a_loss_that_aims_at_a_distance_says_so() -> None:
    assert PreferenceLoss("ipo", beta=0.1).aimed_drift == pytest.approx(2.5)
    assert PreferenceLoss("sigmoid", "ipo", beta=0.5).aimed_drift == pytest.approx(0.5)
    assert PreferenceLoss("ipo", beta=0.1, ipo_length_normalize=False).aimed_drift == 0
    assert PreferenceLoss("sigmoid", beta=0.1).aimed_drift == 0
