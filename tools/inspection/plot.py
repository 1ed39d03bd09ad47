"""The histogram of lengths as SVG for a light or dark page, with the page's font and text colour."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inspection.statistics import Histogram

# Placeholder of the page's text colour while matplotlib draws; no series has it.
_INK = "#010203"
_PANELS = {"prompt": ("prompt",), "responses": ("chosen", "rejected"), "prompt + longer response": ("whole sequence",)}
_COLOURS = {"prompt": "#8a8f98", "chosen": "#2da44e", "rejected": "#e5534b", "whole sequence": "#4184e4"}


def lengths_svg(histogram: Histogram, max_length: int) -> str:
    """Draws an `<svg>` element with panels for prompts, responses and whole sequences, over one axis of tokens."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lengths", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        panels = figure.subplots(len(_PANELS), 1, sharex=True)
        for axes, (title, names) in zip(panels, _PANELS.items(), strict=True):
            _draw(axes, histogram, title, names)
        panels[-1].set_xlabel("tokens before truncation", color=_INK)
        if max_length <= histogram.edges[-1]:
            panels[-1].axvline(max_length, color=_INK, linestyle="--", linewidth=1)
            panels[-1].annotate(
                f"max_length {max_length}",
                (max_length, 0.92),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                va="top",
                color=_INK,
                fontsize=9,
            )
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _for_a_page(buffer.getvalue())


def _draw(axes: Axes, histogram: Histogram, title: str, names: tuple[str, ...]) -> None:
    for name in names:
        colour, counts = _COLOURS[name], histogram.counts[name]
        axes.stairs(counts, histogram.edges, fill=True, color=colour, alpha=0.35, label=name)
        axes.stairs(counts, histogram.edges, color=colour, linewidth=1.2)
    if len(names) > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    axes.set_title(title, loc="left", color=_INK, fontsize=10)
    axes.set_ylabel("pairs", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.margins(x=0)
    axes.set_ylim(bottom=0)


def _for_a_page(svg: str) -> str:
    """Reduces an SVG file to its element: no XML header, global style or fixed size, in the page's text colour."""
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    return element.replace(_INK, "currentColor").strip()
