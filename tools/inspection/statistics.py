"""Statistics of a set of pairs: pure functions of lengths and counts.

Legend: n kept pairs. Lengths are numbers of tokens; those before truncation have `full` in their names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megadpo.data.batch import stream_tokens
from megadpo.data.store import PairCounts, described_counts

Ints = npt.NDArray[np.integer]

_BINS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLengths:
    """Kept and full lengths of n pairs."""

    prompt_n: Ints
    chosen_n: Ints
    rejected_n: Ints
    full_prompt_n: Ints
    full_chosen_n: Ints
    full_rejected_n: Ints

    def full_tokens(self, i: int) -> tuple[int, int, int]:
        """Full lengths of prompt, chosen and rejected of one pair."""
        return int(self.full_prompt_n[i]), int(self.full_chosen_n[i]), int(self.full_rejected_n[i])

    def full_series(self) -> dict[str, Ints]:
        """Full lengths by name; the whole sequence is the prompt with the longer response."""
        return {
            "prompt": self.full_prompt_n,
            "chosen": self.full_chosen_n,
            "rejected": self.full_rejected_n,
            "whole sequence": self.full_prompt_n + np.maximum(self.full_chosen_n, self.full_rejected_n),
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """The distribution of the lengths of a series."""

    mean: float
    median: float
    p95: float
    longest: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Numbers of pairs between `edges`, by series; the last bin also counts all longer ones."""

    edges: npt.NDArray[np.float64]
    counts: dict[str, Ints]


@dataclass(frozen=True, slots=True)
class Sharing:
    """Tokens of an epoch with prompts computed for each response, and with prompts computed once per pair."""

    separate: int
    shared: int

    @property
    def saved(self) -> float:
        """Share of the tokens that prompt sharing saves, in [0, 0.5)."""
        return 1 - self.shared / self.separate


@dataclass(frozen=True, slots=True)
class TruncationLoss:
    """Numbers of tokens that the pair at `position` loses by truncation; those of the prompt count once."""

    position: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def tokens(self) -> int:
        """Number of all lost tokens."""
        return self.prompt + self.chosen + self.rejected


def spread(lengths_n: Ints) -> Spread:
    """Mean, median, 95th percentile (the smallest length that 95 % do not exceed) and maximum."""
    p95 = np.percentile(lengths_n, 95, method="inverted_cdf")
    return Spread(float(lengths_n.mean()), float(np.median(lengths_n)), float(p95), int(lengths_n.max()))


def histogram(series: dict[str, Ints], max_length: int, bins: int = _BINS) -> Histogram:
    """Counts all series over one axis from 0 to the longest, at most twice `max_length`; the last bin has the rest."""
    end = min(max(int(lengths_n.max()) for lengths_n in series.values()), 2 * max_length)
    edges = np.linspace(0, end, bins + 1)
    counts = {name: np.histogram(np.minimum(lengths_n, end), edges)[0] for name, lengths_n in series.items()}
    return Histogram(edges, counts)


def sharing(lengths: PairLengths) -> Sharing:
    """Counts tokens without and with prompt sharing: the sums of 2P + C + R and of P + C + R."""
    sums = [
        int(lengths_n.sum(dtype=np.int64)) for lengths_n in (lengths.prompt_n, lengths.chosen_n, lengths.rejected_n)
    ]
    separate, shared = (stream_tokens(*sums, share_prompt=share_prompt) for share_prompt in (False, True))
    return Sharing(separate, shared)


def most_cut(lengths: PairLengths, most: int) -> list[TruncationLoss]:
    """The pairs that lose the most tokens, at most `most` of them, the worst first, equal ones in the data's order."""
    prompt_n = lengths.full_prompt_n - lengths.prompt_n
    chosen_n = lengths.full_chosen_n - lengths.chosen_n
    rejected_n = lengths.full_rejected_n - lengths.rejected_n
    lost_n = prompt_n + chosen_n + rejected_n
    order = np.argsort(-lost_n, kind="stable")[:most]
    return [
        TruncationLoss(int(i), int(prompt_n[i]), int(chosen_n[i]), int(rejected_n[i])) for i in order if lost_n[i] > 0
    ]


def spaced(total: int, wanted: int) -> list[int]:
    """At most `wanted` different positions spread evenly over `total`, the first and last among them."""
    return sorted({round(x) for x in np.linspace(0, total - 1, min(wanted, total))})


def counted_rows(counts: PairCounts, max_length: int) -> list[tuple[str, int]]:
    """Descriptions and counts of rows that were read, kept, or deserve attention."""
    return [("read", counts.read), ("kept", counts.kept), *described_counts(counts, max_length)]


def dropped(counts: PairCounts) -> int:
    """Number of rows that were read and can't be trained on at this limit."""
    return counts.read - counts.kept - counts.skipped
