"""Prints the report in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from inspection.decoding import Piece, ShownPair
from inspection.report import SetReport
from inspection.statistics import Histogram, counted_rows

# Longer texts are shortened in the middle; the page shows them completely.
_MOST_CHARACTERS = 1200
_BARS = " ▁▂▃▄▅▆▇█"
_SPECIAL = "bold black on yellow"


def print_report(reports: Sequence[SetReport], skipped_rows: Sequence[str], console: Console) -> None:
    """Prints the numbers, lengths, worst cuts and pairs of every set, and the rows that were skipped."""
    for report in reports:
        console.rule(f"[bold]{report.name}")
        _print_counts(report, console)
        _print_lengths(report, console)
        _print_cuts(report, console)
        for pair in report.pairs:
            _print_pair(pair, console)
    if skipped_rows:
        console.rule("[bold]skipped rows")
        for row in skipped_rows:
            console.print(Text(row))


def _print_counts(report: SetReport, console: Console) -> None:
    table = Table(show_header=False, box=None)
    table.add_column(justify="right", style="bold")
    table.add_column()
    for what, number in counted_rows(report.counts, report.max_length):
        table.add_row(f"{number:,}", what)
    table.add_row(f"{report.sharing.separate:,}", "tokens an epoch, every prompt read for both responses")
    table.add_row(
        f"{report.sharing.saved:.1%}", f"of them that prompt sharing saves ({report.sharing.shared:,} are left)"
    )
    console.print(table)


def _print_lengths(report: SetReport, console: Console) -> None:
    table = Table(title="tokens of the kept pairs, before truncation", title_justify="left", box=None)
    table.add_column("", no_wrap=True)
    for heading in ("mean", "median", "95 %", "longest"):
        table.add_column(heading, justify="right")
    table.add_column(f"0 … {report.histogram.edges[-1]:,.0f}", no_wrap=True)
    for name, spread in report.spreads.items():
        numbers = (f"{spread.mean:,.1f}", f"{spread.median:,.0f}", f"{spread.p95:,.0f}", f"{spread.longest:,}")
        table.add_row(name, *numbers, sparkline(report.histogram, name))
    if (mark := marker(report.histogram, report.max_length)) is not None:
        table.add_row("max_length", "", "", "", f"{report.max_length:,}", mark)
    console.print(table)


def sparkline(histogram: Histogram, name: str) -> str:
    """Draws a series with one character per bin, whose height shows its count; only an empty bin is blank."""
    counts = histogram.counts[name]
    top = max(1, int(counts.max()))
    return "".join(_BARS[-(-int(count) * (len(_BARS) - 1) // top)] for count in counts)


def marker(histogram: Histogram, length: int) -> str | None:
    """A mark under the bin of a length; None if the axis ends before it."""
    edges = histogram.edges
    if length > edges[-1]:
        return None
    bins = len(edges) - 1
    return " " * min(bins - 1, int(length * bins / edges[-1])) + "▲"


def _print_cuts(report: SetReport, console: Console) -> None:
    if not report.most_cut:
        return
    table = Table(title=f"most tokens lost ({report.truncation})", title_justify="left", box=None)
    table.add_column("pair")
    for heading in ("lost", "prompt", "chosen", "rejected"):
        table.add_column(heading, justify="right")
    for where, loss in report.most_cut:
        numbers = (loss.tokens, loss.prompt, loss.chosen, loss.rejected)
        table.add_row(Text(where), *(f"{number:,}" for number in numbers))
    console.print(table)


def _print_pair(pair: ShownPair, console: Console) -> None:
    text = Text(f"{pair.where}\n", style="cyan")
    parts = (("prompt", "dim", pair.prompt), ("chosen", "green", pair.chosen), ("rejected", "red", pair.rejected))
    for (name, style, pieces), told in zip(parts, pair.described_tokens(), strict=True):
        text.append(f"── {name} · {told}\n", style="cyan")
        text.append_text(_styled(pieces, style)).append("\n")
    text.rstrip()
    console.print(Panel(text, title=f"pair {pair.index}", title_align="left"))


def _styled(pieces: Sequence[Piece], style: str) -> Text:
    text = Text()
    for piece in pieces:
        text.append(piece.text, style=_SPECIAL if piece.special else style)
    left_out = len(text) - _MOST_CHARACTERS
    if left_out <= 0:
        return text
    half = _MOST_CHARACTERS // 2
    note = Text(f" ⋯ {left_out:,} characters ⋯ ", style="italic dim")
    return text[:half].append_text(note).append_text(text[len(text) - half :])
