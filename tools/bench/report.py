"""Figures from turns: ratios step by step, shares of the machine's matmul rate, and gates on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

SELF = "megadpo"
PROMPT_HEAVY = "prompts four times the responses"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The measurements of one contender: a number for each of its steps, warm-up included."""

    name: str
    seconds: Sequence[float]
    losses: Sequence[float]
    grad_norms: Sequence[float]
    flops: Sequence[int]
    """FLOPs that each step needs with a live reference, by true lengths"""
    tokens: Sequence[int]
    """of each step: prompt + chosen + prompt + rejected of its pairs, however they are computed"""
    mfu: float | None
    """share of the card's data sheet, of the last step, as the contender logs it; None where it doesn't"""
    matmul_rates: Sequence[float]
    """FLOP/s of the machine's matrix products in the turn of each step; empty where they were not measured"""
    reference_logps: Mapping[int, tuple[float, float]]
    """of (chosen, rejected) by pair; empty where the contender does not tell"""
    pairs_per_step: int
    peak_bytes: int
    warmup: int
    reference_seconds: Sequence[float] = ()
    """of each step, the reference's part, as the contender logs it; empty where it doesn't"""

    @property
    def step_seconds(self) -> float:
        """Median over the steps that count."""
        return median(self.seconds[self.warmup :])

    @property
    def pairs_per_s(self) -> float:
        """Pairs over the seconds of all steps that count."""
        counted = self.seconds[self.warmup :]
        return self.pairs_per_step * len(counted) / sum(counted)

    @property
    def tokens_per_s(self) -> float:
        """Tokens over the seconds of all steps that count."""
        return sum(self.tokens[self.warmup :]) / sum(self.seconds[self.warmup :])

    @property
    def flop_rate(self) -> float:
        """FLOPs over the seconds of all steps that count."""
        return sum(self.flops[self.warmup :]) / sum(self.seconds[self.warmup :])

    @property
    def reference_share(self) -> float:
        """Median over the steps of the reference's share of the seconds; NaN if it is not logged."""
        shares = [part / whole for part, whole in zip(self.reference_seconds, self.seconds, strict=False)]
        return median(shares[self.warmup :]) if shares else math.nan

    @property
    def matmul_share(self) -> float:
        """Median over the steps of FLOP/s relative to those of the matrix products alone in the same turn."""
        rows = zip(self.flops, self.seconds, self.matmul_rates, strict=True)
        return median([flops / seconds / rate for flops, seconds, rate in rows][self.warmup :])


def time_ratio(result: Result, base: Result) -> float:
    """Median, over the steps that both have done, of seconds relative to the base's for the same step."""
    rows = list(zip(result.seconds, base.seconds, strict=False))
    return median(own / others for own, others in rows[max(result.warmup, base.warmup) :])


def flop_ratio(result: Result, base: Result) -> float:
    """FLOPs of the steps that both have done, relative to the base's."""
    rows = list(zip(result.flops, base.flops, strict=False))
    return sum(own for own, _ in rows) / sum(others for _, others in rows)


def loss_difference(result: Result, base: Result) -> float:
    """Largest difference of losses over the steps that both have done."""
    return max(abs(own - others) for own, others in zip(result.losses, base.losses, strict=False))


def grad_norm_difference(result: Result, base: Result) -> float:
    """Largest relative difference of gradient norms over the steps that both have done."""
    return _relative(zip(result.grad_norms, base.grad_norms, strict=False))


def logp_difference(result: Result, base: Result) -> float | None:
    """Largest relative difference of a pair's reference log-probs; None if one of the two has none."""
    common = result.reference_logps.keys() & base.reference_logps.keys()
    if not common:
        return None
    sides = (zip(result.reference_logps[i], base.reference_logps[i], strict=True) for i in common)
    return _relative(side for pair in sides for side in pair)


def _relative(rows: Iterable[tuple[float, float]]) -> float:
    return max(abs(own - others) / abs(others) for own, others in rows)


@dataclass(frozen=True, slots=True)
class Gate:
    """A measured value with its bound."""

    what: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """True if the value is on the right side of the bound; False for NaN."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def rival_gates(results: Sequence[Result]) -> list[Gate]:
    """Gates of megadpo against the machine and the rivals that took part."""
    by_name = {result.name: result for result in results}
    own = by_name[SELF]
    gates = [Gate("share of the matmul rate", own.matmul_share, 0.60)]
    if naive := by_name.get("naive"):
        gates += [
            Gate("pairs/s over the naive rival's (goal 1.3)", time_ratio(naive, own), 1.15),
            Gate("peak memory over the naive rival's", own.peak_bytes / naive.peak_bytes, 1.25, at_most=True),
        ]
    if trl := by_name.get("trl"):
        gates.append(Gate("pairs/s over TRL's", time_ratio(trl, own), 5.0))
    rivals = [result for result in results if result is not own]
    return gates + [Gate(f"loss, from {r.name}'s", loss_difference(own, r), 1e-5, at_most=True) for r in rivals]


def ablation_gates(results: Sequence[Result]) -> list[Gate]:
    """Gates that the numbers are the same in all rows of the ablation."""
    first, *others = results
    logps = [difference for other in others if (difference := logp_difference(other, first)) is not None]
    norms = [grad_norm_difference(other, first) for other in others]
    return [
        Gate("log-probs of the ablations apart, relative", max(logps), 1e-4, at_most=True),
        Gate("gradient norms of the ablations apart, relative", max(norms), 1e-4, at_most=True),
    ]


def sharing_gates(by_set: Mapping[str, Sequence[Result]]) -> list[Gate]:
    """Gates on repeated relative to shared prompts: by FLOPs on the file's pairs, by time on prompt-heavy ones."""
    gates = []
    for name, (twice, shared) in by_set.items():
        flops = flop_ratio(twice, shared)
        bound = 1.3 if name == PROMPT_HEAVY else 0.85 * flops
        gates.append(Gate(f"sharing, {name}: time ratio ({flops:.3f} in FLOPs)", time_ratio(twice, shared), bound))
    return gates


def layout_gates(results: Sequence[Result]) -> list[Gate]:
    """Gates on two ranks with a thread each relative to one."""
    one, *others = results
    bounds = {"dp2": 1.6, "tp2": 1.3}
    return [Gate(f"pairs/s of {r.name} over one rank's", time_ratio(one, r), bounds[r.name]) for r in others]


def reference_gates(results: Sequence[Result], peaks: Mapping[str, int], weights: int) -> list[Gate]:
    """Gates of each reference mode against a resident reference of `weights` bytes.

    `peaks` are the modes' peak memory in bytes.
    """
    by_mode = {result.name: result for result in results}
    resident = by_mode["resident"]
    gates = [
        Gate(
            f"peak memory of {mode} over resident's less the reference's weights",
            peaks[mode] / (peaks["resident"] - weights),
            1.0,
            at_most=True,
        )
        for mode in ("cached", "none")
        if mode in by_mode
    ]
    if cached := by_mode.get("cached"):
        gates += [
            Gate("time of a cached step over a resident one's", time_ratio(cached, resident), 0.8, at_most=True),
            Gate("the reference's share of a cached step", cached.reference_share, 0.02, at_most=True),
        ]
    # Without a reference it is another loss.
    same_loss = [result for result in results if result.name not in ("resident", "none")]
    return gates + [
        Gate(f"loss, {result.name}'s from resident's", loss_difference(result, resident), 1e-5, at_most=True)
        for result in same_loss
    ]


def quiet_gate(foreign_cpu: Mapping[str, float]) -> Gate:
    """Gate that no other program used the machine; threads that wait for each other are slowed tenfold by another."""
    return Gate("CPU time that went to other programs", max(foreign_cpu.values()), 0.1, at_most=True)


def to_row_before(results: Sequence[Result]) -> list[float | None]:
    """Time ratio of each result to the one before it."""
    return [None, *(time_ratio(own, before) for before, own in pairwise(results))]
