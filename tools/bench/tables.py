"""Output of the figures: tables for the terminal, JSON, and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from bench.report import (
    Gate,
    Result,
    grad_norm_difference,
    logp_difference,
    loss_difference,
    time_ratio,
    to_row_before,
)

Column = tuple[str, Callable[[Result], str]]

_COMMON: list[Column] = [
    ("", lambda r: r.name),
    ("steps", lambda r: str(len(r.seconds) - r.warmup)),
    ("s a step", lambda r: f"{r.step_seconds:.3f}"),
    ("pairs/s", lambda r: f"{r.pairs_per_s:.2f}"),
    ("tokens/s", lambda r: f"{r.tokens_per_s:.0f}"),
    ("peak GiB", lambda r: f"{r.peak_bytes / 2**30:.2f}"),
]


def rival_table(title: str, results: Sequence[Result], base: Result) -> Table:
    """Table with a row per contender, and ratios to `base`."""
    columns: list[Column] = [
        *_COMMON,
        ("GFLOP/s", lambda r: f"{r.flop_rate / 1e9:.0f}"),
        ("of matmul rate", lambda r: f"{r.matmul_share:.0%}"),
        *([("MFU", lambda r: _number(r.mfu, ".1%"))] if any(r.mfu is not None for r in results) else []),
        (f"time / {base.name}", lambda r: f"{time_ratio(r, base):.2f}"),
        ("loss apart", lambda r: f"{loss_difference(r, base):.1e}"),
        ("gradient norm apart", lambda r: f"{grad_norm_difference(r, base):.1e}"),
        ("log-probs apart", lambda r: _number(logp_difference(r, base), ".1e")),
    ]
    return _table(title, columns, results)


def ladder_table(title: str, results: Sequence[Result]) -> Table:
    """Like `first_table`, with an additional column for the time ratio to the row before."""
    before = dict(zip((r.name for r in results), to_row_before(results), strict=True))
    return _table(
        title, [*_to_first(results), ("time / row before", lambda r: _number(before[r.name], ".2f"))], results
    )


def first_table(title: str, results: Sequence[Result]) -> Table:
    """Table with a row per contender, and ratios to the first."""
    return _table(title, _to_first(results), results)


def reference_table(title: str, results: Sequence[Result], resident: Result) -> Table:
    """Table with a row per reference mode: the reference's share, memory and time relative to a resident one."""
    columns: list[Column] = [
        *_COMMON,
        ("reference's share", lambda r: f"{r.reference_share:.1%}"),
        ("peak - resident's, MiB", lambda r: f"{(r.peak_bytes - resident.peak_bytes) / 2**20:+.0f}"),
        (f"time / {resident.name}", lambda r: f"{time_ratio(r, resident):.2f}"),
        ("loss apart", lambda r: f"{loss_difference(r, resident):.1e}"),
    ]
    return _table(title, columns, results)


def _to_first(results: Sequence[Result]) -> list[Column]:
    first = results[0]
    return [
        *_COMMON,
        ("loss apart", lambda r: f"{loss_difference(r, first):.1e}"),
        ("gradient norm apart", lambda r: f"{grad_norm_difference(r, first):.1e}"),
        ("log-probs apart", lambda r: _number(logp_difference(r, first), ".1e")),
        (f"time / {first.name}", lambda r: f"{time_ratio(r, first):.2f}"),
    ]


def loss_table(results: Sequence[Result]) -> Table:
    """Table of every step's losses side by side."""
    table = Table(title="losses", title_justify="left")
    for name in ("step", *(result.name for result in results)):
        table.add_column(name, justify="right")
    for step in range(max(len(result.losses) for result in results)):
        cells = (f"{result.losses[step]:.7f}" if step < len(result.losses) else "" for result in results)
        table.add_row(str(step + 1), *cells)
    return table


def gate_table(gates: Sequence[Gate]) -> Table:
    """Table of all gates, and their verdicts."""
    table = Table(title="held to", title_justify="left")
    for name in ("", "measured", "bound", ""):
        table.add_column(name, justify="right" if name else "left")
    for gate in gates:
        bound = f"{'≤' if gate.at_most else '≥'} {gate.bound:.3g}"
        table.add_row(gate.what, f"{gate.value:.3g}", bound, "holds" if gate.holds else "[red]fails[/red]")
    return table


def write_json(
    path: Path, conditions: Mapping[str, Any], sections: Mapping[str, Sequence[Result]], gates: Sequence[Gate]
) -> None:
    """Writes all measurements and their conditions."""
    found = {
        "conditions": conditions,
        "sections": {title: [asdict(result) for result in results] for title, results in sections.items()},
        "gates": [{**asdict(gate), "holds": gate.holds} for gate in gates],
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def draw(path: Path, sections: Mapping[str, Sequence[Result]]) -> None:
    """Draws the seconds of every step, a panel per section, as PNG, SVG or another format."""
    figure = Figure(figsize=(8, 3 * len(sections)), layout="constrained")
    panels = figure.subplots(len(sections), 1, squeeze=False)[:, 0]
    for axes, (title, results) in zip(panels, sections.items(), strict=True):
        for result in results:
            axes.plot(range(1, len(result.seconds) + 1), result.seconds, marker=".", label=result.name)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("seconds a step")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set_xlabel("step")
    figure.savefig(path)


def _table(title: str, columns: Sequence[Column], results: Sequence[Result]) -> Table:
    table = Table(title=title, title_justify="left")
    for name, _ in columns:
        table.add_column(name, justify="right" if name else "left")
    for result in results:
        table.add_row(*(cell(result) for _, cell in columns))
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
