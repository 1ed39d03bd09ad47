"""The report as a self-contained HTML page; every text of the data is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from inspection.decoding import Piece, ShownPair
from inspection.plot import lengths_svg
from inspection.report import SetReport
from inspection.statistics import counted_rows, dropped

_STYLE = Path(__file__).with_name("page.css")


def render_page(reports: Sequence[SetReport], skipped_rows: Sequence[str], sources: Sequence[str]) -> str:
    """Renders the page: for each set the numbers, the plot, the tables, and the pairs side by side."""
    body = "".join(_section(report) for report in reports)
    if skipped_rows:
        rows = "".join(f"<li>{escape(row)}</li>" for row in skipped_rows)
        body += f"<section><h2>Skipped rows</h2><ul>{rows}</ul></section>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Preference data</title>'
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<header><h1>Preference data</h1><p>{' · '.join(escape(source) for source in sources)}</p></header>"
        f"<main>{body}</main></body></html>\n"
    )


def _section(report: SetReport) -> str:
    counts, sharing = report.counts, report.sharing
    cut = counts.truncated_prompt + counts.truncated_chosen + counts.truncated_rejected
    tiles = [
        (f"{counts.kept:,}", f"pairs kept of {counts.read:,} read"),
        (f"{dropped(counts):,}", "pairs dropped"),
        (f"{counts.skipped:,}", "rows skipped"),
        (f"{cut:,}", f"texts cut ({report.truncation}, max_length {report.max_length:,})"),
        (f"{sharing.separate:,}", "tokens an epoch"),
        (f"{sharing.saved:.1%}", f"of them that prompt sharing saves ({sharing.shared:,} are left)"),
    ]
    numbers = "".join(f"<div><b>{number}</b><span>{escape(what)}</span></div>" for number, what in tiles)
    return (
        f'<section><h2>{escape(report.name)}</h2><div class="tiles">{numbers}</div>'
        f"<h3>Lengths</h3>{lengths_svg(report.histogram, report.max_length)}"
        f"<p class=note>Kept pairs. The last bar also holds all that is longer.</p>{_spreads(report)}"
        f"<h3>What became of the rows</h3>{_counts(report)}{_cuts(report)}"
        f"<h3>Pairs as they are trained on</h3>{_LEGEND}{''.join(_pair(pair) for pair in report.pairs)}</section>"
    )


_LEGEND = (
    '<p class=note><span class="prompt">prompt, read</span> · <span class="chosen">chosen, scored</span> · '
    '<span class="rejected">rejected, scored</span> · <mark>special token</mark></p>'
)


def _spreads(report: SetReport) -> str:
    rows = [
        (name, f"{s.mean:,.1f}", f"{s.median:,.0f}", f"{s.p95:,.0f}", f"{s.longest:,}")
        for name, s in report.spreads.items()
    ]
    return _table(("tokens", "mean", "median", "95 %", "longest"), rows)


def _counts(report: SetReport) -> str:
    return _table(
        ("", "rows"), [(what, f"{number:,}") for what, number in counted_rows(report.counts, report.max_length)]
    )


def _cuts(report: SetReport) -> str:
    if not report.most_cut:
        return ""
    rows = [
        (where, *(f"{n:,}" for n in (loss.tokens, loss.prompt, loss.chosen, loss.rejected)))
        for where, loss in report.most_cut
    ]
    return f"<h3>Most tokens lost</h3>{_table(('pair', 'lost', 'prompt', 'chosen', 'rejected'), rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return (
        f"<table><thead>{row(head, 'th')}</thead><tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"
    )


def _pair(pair: ShownPair) -> str:
    prompt, chosen, rejected = pair.described_tokens()
    return (
        f"<article><h4>pair {pair.index} <small>{escape(pair.where)}</small></h4>"
        f'<div class="text prompt"><small>prompt · {prompt}</small><pre>{_text(pair.prompt)}</pre></div>'
        f'<div class="sides"><div class="text chosen"><small>chosen · {chosen}</small>'
        f"<pre>{_text(pair.chosen)}</pre></div>"
        f'<div class="text rejected"><small>rejected · {rejected}</small>'
        f"<pre>{_text(pair.rejected)}</pre></div></div></article>"
    )


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(f"<mark>{escape(p.text)}</mark>" if p.special else escape(p.text) for p in pieces)
