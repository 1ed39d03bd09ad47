"""The curves of a run as one picture: loss, reward margins and accuracies over updates, from its metrics.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Metric -> title of its panel. The names are those of metrics.jsonl.
PANELS = {"loss": "loss", "rewards/margins": "rewards/margins", "rewards/accuracies": "rewards/accuracies"}
_TRAINING, _EVALUATION = "#8a8f98", ("#2da44e", "#4184e4", "#e5534b", "#bf8700")


def read_curves(metrics: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Points (step, value) of each metric of PANELS, by series: "training", "evaluation" or "evaluation NAME"."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {name: defaultdict(list) for name in PANELS}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for key, value in values.items():
            for name in PANELS:
                if key == name:
                    curves[name]["training"].append((values["step"], value))
                elif key.startswith("eval/") and key.endswith(f"/{name}"):
                    dataset = key.removeprefix("eval/").removesuffix(name).rstrip("/")
                    curves[name][f"evaluation {dataset}".rstrip()].append((values["step"], value))
    return curves


def draw_curves(metrics: Path, picture: Path, *, title: str) -> None:
    """Writes a panel for each metric of PANELS to `picture`, whose suffix is its format (.png, .svg, .pdf)."""
    curves = read_curves(metrics)
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(9, 3), layout="constrained", facecolor="white")
        figure.suptitle(title, fontsize=10)
        for axes, (name, heading) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            _draw(axes, curves[name], heading)
        figure.savefig(picture, dpi=160, metadata={"Date": None} if picture.suffix == ".svg" else None)


def _draw(axes: Axes, series: dict[str, list[tuple[int, float]]], heading: str) -> None:
    evaluations = [name for name in series if name != "training"]
    if "training" in series:
        axes.plot(*zip(*series["training"], strict=True), color=_TRAINING, linewidth=1.2, label="training")
    for name, colour in zip(evaluations, _EVALUATION * len(evaluations), strict=False):
        axes.plot(*zip(*series[name], strict=True), color=colour, linewidth=1.6, marker="o", markersize=5, label=name)
    axes.set_title(heading, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if heading.endswith("accuracies"):
        axes.set_ylim(0, 1.03)
    if series:
        axes.legend(frameon=False, fontsize=8)
