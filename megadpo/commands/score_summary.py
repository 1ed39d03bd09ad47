"""The summary of a scoring: means over all pairs and over pairs of like length. Numbers only; legend: n pairs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.table import Table

Numbers: TypeAlias = npt.NDArray[np.float64]
Lengths: TypeAlias = npt.NDArray[np.int64]

BY = ("response", "stream")
_POLICY = ("chosen_logp", "rejected_logp")
_REFERENCE = ("reference_chosen_logp", "reference_rejected_logp")
# Of the means, what a terminal has room for.
_COLUMNS = ("logps/margins", "logps/accuracies", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """The split of pairs by length: into `count` equally filled buckets, or at `edges` where there are any."""

    by: str = "response"
    """response: scored tokens of both responses; stream: tokens that the pair takes in a microbatch"""
    count: int = 4
    edges: tuple[int, ...] = ()

    def edges_of(self, lengths_n: Lengths) -> list[int]:
        """Lengths at which a new bucket begins, increasing; equal lengths share a bucket, so that there may be less."""
        if self.edges:
            return list(self.edges)
        shares = np.arange(1, self.count) / self.count
        edges = np.unique(np.quantile(lengths_n, shares, method="higher"))
        return [int(edge) for edge in edges if edge > lengths_n.min()]


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs (nats) of n pairs under the scored model and, where there is one, under a reference."""

    logps_n: tuple[Numbers, Numbers]
    """of chosen and rejected responses"""
    reference_n: tuple[Numbers, Numbers] | None
    response_tokens_n: Lengths

    def means(self, beta: float, where_n: npt.NDArray[np.bool_] | None = None) -> dict[str, float]:
        """Means over the pairs, or those `where_n` is true, under the names that metrics.jsonl has for them.

        `rewards/…` are those of DPO, β times the policy's log-prob less the reference's. An accuracy is the share of
        pairs whose chosen response is strictly the better one.
        """
        chosen_n, rejected_n = self.logps_n
        found: dict[str, npt.NDArray[Any]] = {
            "logps/chosen": chosen_n,
            "logps/rejected": rejected_n,
            "logps/margins": chosen_n - rejected_n,
            "logps/accuracies": chosen_n > rejected_n,
        }
        if self.reference_n is not None:
            reference_chosen_n, reference_rejected_n = self.reference_n
            chosen_n, rejected_n = beta * (chosen_n - reference_chosen_n), beta * (rejected_n - reference_rejected_n)
            found |= {
                "rewards/chosen": chosen_n,
                "rewards/rejected": rejected_n,
                "rewards/margins": chosen_n - rejected_n,
                "rewards/accuracies": chosen_n > rejected_n,
            }
        return {
            name: float(np.mean(values_n if where_n is None else values_n[where_n])) for name, values_n in found.items()
        }


def with_reference(line: Mapping[str, Any], reference: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """A pair's line of output from its two lines: both models' log-probs and DPO's reward margin."""
    chosen, rejected = (line[own] - reference[theirs] for own, theirs in zip(_POLICY, _REFERENCE, strict=True))
    return {**line, **{name: reference[name] for name in _REFERENCE}, "reward_margin": beta * (chosen - rejected)}


def read_scores(lines: Iterable[Mapping[str, Any]]) -> Scores:
    """The numbers of a scoring's lines, of which all have a reference's or none."""
    columns = {name: array("d") for name in (*_POLICY, *_REFERENCE)}
    tokens = array("q")
    for line in lines:
        for name, column in columns.items():
            if name in line:
                column.append(line[name])
        tokens.append(line["chosen_tokens"] + line["rejected_tokens"])
    policy, reference = (
        (np.array(columns[chosen]), np.array(columns[rejected])) for chosen, rejected in (_POLICY, _REFERENCE)
    )
    return Scores(policy, reference if reference[0].size else None, np.array(tokens, dtype=np.int64))


def summarise(scores: Scores, stream_tokens_n: Lengths, buckets: Buckets, beta: float) -> dict[str, Any]:
    """Means over all pairs and, under `buckets`, over those of each bucket; a bucket without pairs has no means."""
    lengths_n = scores.response_tokens_n if buckets.by == "response" else stream_tokens_n
    edges = buckets.edges_of(lengths_n)
    bucket_n = np.searchsorted(edges, lengths_n, side="right")
    rows = []
    for index, (low, high) in enumerate(zip([0, *edges], [*edges, None], strict=True)):
        where_n = bucket_n == index
        means = scores.means(beta, where_n) if where_n.any() else {}
        rows.append({"from": low, "below": high, "pairs": int(where_n.sum()), **means})
    return {**scores.means(beta), "buckets": {"by": buckets.by, "rows": rows}}


def bucket_table(summary: Mapping[str, Any]) -> Table:
    """A row for each bucket of a summary, and one for all pairs."""
    by, rows = summary["buckets"]["by"], summary["buckets"]["rows"]
    names = [name for name in _COLUMNS if name in summary]
    table = Table()
    for title in (f"{by} tokens", "pairs", *names):
        table.add_column(title.replace("/", "/\n"), justify="right")
    for row in rows:
        table.add_row(_span(row["from"], row["below"]), *_cells(row, names))
    table.add_section()
    table.add_row("all", *_cells(summary, names))
    return table


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [str(row["pairs"]), *(f"{row[name]:.4f}" if name in row else "" for name in names)]


def _span(low: int, high: int | None) -> str:
    return f"{low} and more" if high is None else f"{low} to {high - 1}"
