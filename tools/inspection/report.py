"""Collects the report on a set of pairs before it is displayed."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from inspection.decoding import ShownPair, show_pair
from inspection.statistics import (
    Histogram,
    PairLengths,
    Sharing,
    Spread,
    TruncationLoss,
    histogram,
    most_cut,
    sharing,
    spaced,
    spread,
)
from megadpo.data.store import PairCounts, PairView

_MOST_CUT_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """The report on a set of pairs; `most_cut` has the location of each pair."""

    name: str
    counts: PairCounts
    max_length: int
    truncation: str
    spreads: dict[str, Spread]
    histogram: Histogram
    sharing: Sharing
    most_cut: list[tuple[str, TruncationLoss]]
    pairs: list[ShownPair]


def report_set(
    name: str, view: PairView, tokenizer: PreTrainedTokenizerBase, *, max_length: int, truncation: str, pairs: int
) -> SetReport:
    """Makes the report on a set of pairs, with the given number of pairs decoded."""
    lengths = PairLengths(
        prompt_n=view.prompt_lengths,
        chosen_n=view.chosen_lengths,
        rejected_n=view.rejected_lengths,
        full_prompt_n=view.full_prompt_lengths,
        full_chosen_n=view.full_chosen_lengths,
        full_rejected_n=view.full_rejected_lengths,
    )
    series = lengths.full_series()
    return SetReport(
        name=name,
        counts=view.counts,
        max_length=max_length,
        truncation=truncation,
        spreads={key: spread(lengths_n) for key, lengths_n in series.items()},
        histogram=histogram(series, max_length),
        sharing=sharing(lengths),
        most_cut=[(view[loss.position].where, loss) for loss in most_cut(lengths, _MOST_CUT_SHOWN)],
        pairs=[show_pair(view[i], lengths.full_tokens(i), tokenizer) for i in spaced(len(view), pairs)],
    )
