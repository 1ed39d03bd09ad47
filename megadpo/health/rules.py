"""The rules that hint at an unhealthy run: pure functions of the training lines of metrics.jsonl.

Each rule's docstring says when it holds; docs/health.md has the same as a table, with sources. Blocks and windows are
defined in history.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median, stdev

from megadpo.health.history import (
    CLIPPED_UPDATES,
    LONG_WINDOW,
    SPIKE_LINES,
    WINDOW,
    History,
    Line,
    RunFacts,
    merge_lines,
)

# Thresholds, as docs/health.md has them.
FALL = 0.25
FALL_PER_TOKEN = 0.1
FALL_PER_GAIN = 1.5
LOSS_LEFT = 0.1
DRIFT_PER_TOKEN = 1.0
DRIFT_PER_RESPONSE = 50.0
LENGTH_CORRELATION = 0.5
LEAST_LENGTH_WEIGHT = 256
CLIPPED_SHARE = 0.95
LOSS_FACTOR = 2.0
NORM_FACTOR = 10.0
SPIKE_DEVIATIONS = 6.0
LEAST_DEVIATION = 0.05

# exp() stays in range.
_LARGEST_EXPONENT = 700.0
_LOOK_AT_ROWS = (
    "Look at the pairs of that update; where spikes return, a lower optimizer.lr or optimizer.clip_grad helps"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that holds: the evidence as a sentence and as numbers."""

    text: str
    evidence: Mapping[str, float]


def _found(text: str, **evidence: float) -> Finding:
    return Finding(text.format(**evidence), evidence)


def chosen_reward_falling(history: History, facts: RunFacts) -> Finding | None:
    """The chosen rewards fall, by much compared with the gain of the margin.

    From the first window to the long one the mean chosen reward has fallen by more than 0.25 and by more than 1.5 times
    the gain of the margin, plus 3 standard errors of the long window's mean (from the spread of its blocks); and it is
    lower in the later half of the long window than in the earlier. Without a reference rewards are per token, and the
    limit is 0.1 nats per token instead of 0.25. Not judged if the loss lowers chosen responses (apo_down).
    """
    latest, first = history.latest(LONG_WINDOW), history.first
    if not latest or first is None or not facts.raises_chosen:
        return None
    now, earlier, later = (
        merge_lines(latest),
        merge_lines(latest[: LONG_WINDOW // 2]),
        merge_lines(latest[LONG_WINDOW // 2 :]),
    )
    error = stdev(block["rewards/chosen"] for block in latest) / math.sqrt(LONG_WINDOW)
    lost, gained = first["rewards/chosen"] - now["rewards/chosen"], now["rewards/margins"] - first["rewards/margins"]
    least = FALL if facts.has_reference else FALL_PER_TOKEN * facts.beta
    still_falls = later["rewards/chosen"] < earlier["rewards/chosen"]
    if not (lost - 3 * error > max(least, FALL_PER_GAIN * gained) and still_falls):
        return None
    return _found(
        "the mean chosen reward has fallen from {first:+.3f} over the first pairs to {earlier:+.3f} and then "
        "{later:+.3f} over the last two times {pairs:.0f}, while the margin has gained {gained:+.3f}",
        first=first["rewards/chosen"],
        earlier=earlier["rewards/chosen"],
        later=later["rewards/chosen"],
        pairs=later.pairs,
        gained=gained,
    )


def margin_saturating(history: History, facts: RunFacts) -> Finding | None:
    """The window's mean loss is within the last tenth of the way from its value without preference to its minimum.

    With the sigmoid loss a pair's gradient is scaled by σ(−βd), which is nearly the loss once that is small, so that
    little is left to learn. Not judged if a part of the loss has no reference.
    """
    latest, first = history.latest(WINDOW), history.first
    if not latest or first is None or facts.loss_at_start is None or facts.least_loss is None:
        return None
    now = merge_lines(latest)
    if not now["loss"] - facts.least_loss < LOSS_LEFT * (facts.loss_at_start - facts.least_loss):
        return None
    return _found(
        "the mean loss over the last {pairs:.0f} pairs is {loss:.4f}, between {least:.4f} at least and {start:.4f} "
        "without preference; accuracy {accuracy:.3f}, margin {margin:+.2f}, gradient norm {grad_norm:.3g} after "
        "{grad_norm_first:.3g} at first",
        pairs=now.pairs,
        loss=now["loss"],
        least=facts.least_loss,
        start=facts.loss_at_start,
        accuracy=now["rewards/accuracies"],
        margin=now["rewards/margins"],
        grad_norm=now["grad_norm"],
        grad_norm_first=first["grad_norm"],
    )


def accuracy_flat(history: History, facts: RunFacts) -> Finding | None:
    """The accuracy is not significantly better than chance.

    Over the latest LONG_WINDOW blocks, 2048 pairs or more, it is less than one standard error of a fair coin
    (0.5/√pairs) above 0.5. Judged from TRAINED_PAIRS pairs on, each weighted by its learning rate relative to the peak,
    so that a warm-up counts little. Without a reference a policy does not start at chance: then neither accuracy nor
    margin is above the first window's, and only a run that is known from its start is judged.
    """
    latest, first = history.latest(LONG_WINDOW), history.first
    if not latest or first is None or not history.has_trained(facts):
        return None
    now = merge_lines(latest)
    if not facts.has_reference:
        risen = any(now[metric] > first[metric] for metric in ("rewards/accuracies", "rewards/margins"))
        if risen or not history.whole:
            return None
        return _found(
            "reward accuracy over the last {pairs:.0f} pairs is {accuracy:.3f} and the margin {margin:+.4g}, over the "
            "first ones they were {first:.3f} and {first_margin:+.4g}; {trained:.0f} pairs have been trained on",
            pairs=now.pairs,
            accuracy=now["rewards/accuracies"],
            margin=now["rewards/margins"],
            first=first["rewards/accuracies"],
            first_margin=first["rewards/margins"],
            trained=history.pairs,
        )
    error = 0.5 / math.sqrt(now.pairs)
    if not now["rewards/accuracies"] < 0.5 + error:
        return None
    return _found(
        "reward accuracy over the last {pairs:.0f} pairs is {accuracy:.3f}, guessing gives 0.5 ± {error:.3f}; "
        "{trained:.0f} pairs have been trained on",
        pairs=now.pairs,
        accuracy=now["rewards/accuracies"],
        error=error,
        trained=history.pairs,
    )


def kl_drift(history: History, facts: RunFacts) -> Finding | None:
    """The policy has moved more than 1 nat per token, and more than 50 nats per response, from the reference.

    Measured by the window's mean log-ratios, rewards/β, of chosen (u) and rejected (v) responses alike: |u| + |v| per
    token of both, and half of it per response. It is an estimate on the data's responses; the KL divergence itself is a
    mean over samples of the policy, of which there are none. If the loss aims at a distance (ipo per token), the limit
    is twice that instead of 1 nat, if it is more.
    """
    latest = history.latest(WINDOW)
    if not latest or not facts.has_reference:
        return None
    now = merge_lines(latest)
    u, v = now["rewards/chosen"] / facts.beta, now["rewards/rejected"] / facts.beta
    moved = abs(u) + abs(v)
    per_token = moved / (now["lengths/chosen"] + now["lengths/rejected"])
    if not (per_token > max(DRIFT_PER_TOKEN, 2 * facts.aimed_drift) and moved / 2 > DRIFT_PER_RESPONSE):
        return None
    return _found(
        "over the last {pairs:.0f} pairs log p(policy) - log p(reference) is {chosen:+.1f} nats for chosen and "
        "{rejected:+.1f} for rejected responses, {per_token:.2f} nats per token either way",
        pairs=now.pairs,
        chosen=u,
        rejected=v,
        per_token=per_token,
    )


def length_bias(history: History, facts: RunFacts) -> Finding | None:
    """Margins correlate with lengths: the mean of the window's length correlations is above 0.5 or below -0.5.

    Judged from TRAINED_PAIRS pairs on, as in `accuracy_flat`, since the first margins are hardly more than rounding. A
    line's correlation has the weight of its pairs minus one; their sum must be 256 or more, for a standard error of at
    most 0.06.
    """
    latest = history.latest(WINDOW)
    if not latest or not history.has_trained(facts):
        return None
    now = merge_lines(latest)
    r = now.length_correlation
    if not (now.length_weight >= LEAST_LENGTH_WEIGHT and abs(r) > LENGTH_CORRELATION):
        return None
    return _found(
        "over the last {pairs:.0f} pairs the margin correlates by {r:+.2f} with how many tokens longer the chosen "
        "response is: " + ("longer" if r > 0 else "shorter") + " responses are preferred as such",
        pairs=now.pairs,
        r=r,
        error=1 / math.sqrt(now.length_weight),
    )


def gradient_always_clipped(history: History, facts: RunFacts) -> Finding | None:
    """At least 95 of the latest CLIPPED_UPDATES updates had a gradient norm above optimizer.clip_grad.

    With train.log_every above 1 an update counts with the mean norm of its line.
    """
    lines: list[Line] = []
    updates = 0
    for line in reversed(history.lines):
        lines.append(line)
        updates += line.updates
        if updates >= CLIPPED_UPDATES:
            break
    if updates < CLIPPED_UPDATES or facts.clip_grad <= 0:
        return None
    share = sum(line.updates for line in lines if line["grad_norm"] > facts.clip_grad) / updates
    if not share >= CLIPPED_SHARE:
        return None
    return _found(
        "{share:.0%} of the last {updates} updates were clipped at {clip_grad:g}; their median gradient norm is "
        "{median:.3g}",
        share=share,
        updates=updates,
        clip_grad=facts.clip_grad,
        median=median(line["grad_norm"] for line in lines),
    )


def loss_spike(history: History, facts: RunFacts) -> Finding | None:
    """The line's loss is more than twice the median of the SPIKE_LINES lines before, and an outlier; see `_spike`."""
    return _spike("loss", "loss", history.lines, factor=LOSS_FACTOR)


def grad_norm_spike(history: History, facts: RunFacts) -> Finding | None:
    """The line's gradient norm is more than 10 times the median of the SPIKE_LINES lines before, and an outlier.

    The factor is large because tails are heavy: in a tiny model's run on contradicting labels, one norm in sixty was 6
    times the median.
    """
    return _spike("gradient norm", "grad_norm", history.lines, factor=NORM_FACTOR)


def _spike(name: str, metric: str, lines: Iterable[Line], *, factor: float) -> Finding | None:
    """Returns a finding if the latest value is `factor` times the median of those before, and 6 deviations above it.

    It is computed in logarithms, since both numbers are skewed. A deviation is 1.4826 times the median distance from
    the median, which for normal numbers is the standard deviation, and at least 0.05. At least half of the SPIKE_LINES
    values before must exist. A loss that is not positive has no logarithm and is not judged. Lines with less than half
    the usual pairs (an epoch's last batch) are noisier; they are neither judged nor among the values before.
    """
    latest = list(lines)
    usual = median(line.pairs for line in latest)
    *before, now = [line[metric] for line in latest if line.pairs >= usual / 2][-SPIKE_LINES - 1 :]
    if latest[-1].pairs < usual / 2 or len(before) < SPIKE_LINES // 2 or min(now, *before) <= 0:
        return None
    logs = [math.log(value) for value in before]
    middle = median(logs)
    deviation = max(LEAST_DEVIATION, 1.4826 * median(abs(value - middle) for value in logs))
    above = math.log(now) - middle
    if not above > max(math.log(factor), SPIKE_DEVIATIONS * deviation):
        return None
    return _found(
        f"the {name} is {{value:.4g}}, {{times:.1f}} times the median of the {len(before)} lines before",
        value=now,
        times=math.exp(min(above, _LARGEST_EXPONENT)),
        deviations=above / deviation,
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule with the name of its hint, and advice.

    It is judged whenever a block is complete, or with each line if `every_line`: then it is about that line only, whose
    rows are worth a look. The hint has ended when the rule was judged `quiet` times without holding. `of_preference`:
    not judged for a loss without preference; `note`: it may be intended.
    """

    name: str
    check: Callable[[History, RunFacts], Finding | None]
    advice: str
    quiet: int = LONG_WINDOW
    every_line: bool = False
    of_preference: bool = True
    note: bool = False


RULES = (
    Rule(
        "chosen_reward_falling",
        chosen_reward_falling,
        "Good responses become less likely too. Try a lower optimizer.lr, a larger loss.beta, or +loss=rpo, which adds "
        "the chosen responses' likelihood to the loss",
    ),
    Rule(
        "margin_saturating",
        margin_saturating,
        "The pairs are told apart, and gradients vanish. Stop here, train fewer epochs, or find harder pairs; a "
        "smaller loss.beta lets log-ratios grow further",
    ),
    Rule(
        "accuracy_flat",
        accuracy_flat,
        "Nothing is learnt. Try a larger optimizer.lr; then see that chosen and rejected are not the same or mixed up "
        "(tools/inspect_data.py)",
    ),
    Rule(
        "kl_drift",
        kl_drift,
        "Look at what the model writes. Try a larger loss.beta, a lower optimizer.lr or fewer steps, or an earlier "
        "checkpoint",
    ),
    Rule(
        "length_bias",
        length_bias,
        "Compare with how lengths go with the preference in the data. Try loss.ld_alpha, or a loss that counts per "
        "token (sigmoid_norm, simpo)",
    ),
    Rule(
        "gradient_always_clipped",
        gradient_always_clipped,
        "Every update has the same gradient norm then, and an outlier is like any other. AdamW makes up for a constant "
        "factor, so this may do no harm; an optimizer.clip_grad of about twice the median leaves usual updates alone",
        of_preference=False,
        note=True,
    ),
    Rule("loss_spike", loss_spike, _LOOK_AT_ROWS, quiet=SPIKE_LINES, every_line=True, of_preference=False),
    Rule("grad_norm_spike", grad_norm_spike, _LOOK_AT_ROWS, quiet=SPIKE_LINES, every_line=True, of_preference=False),
)
