"""Colours and axes of every picture, and saving one without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mapet.files import replacing

INK = "#22303c"
FAINT = "#8b98a5"
PAPER = "#ffffff"
HIDDEN = "#eef1f4"
CONTEXT = "#2f6690"
TARGET = "#3aa17e"
MASK = "#f0a202"
QUERY = "#b5446e"
CYCLE = (CONTEXT, QUERY, TARGET, MASK, "#6c5b9e", "#7f8c8d")
"""Lines of one plot, in this order."""


def frame(axes: Axes, grid: Literal["x", "y", "both"] = "both") -> None:
    """A light grid behind what is drawn, and no lines above it and to its right."""
    axes.grid(axis=grid, color=FAINT, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", colors=INK, labelsize=9)


def save(figure: Figure, path: str | Path, *, dpi: int = 160) -> Path:
    """Write a PNG, whole or not at all, making its folder; the path is returned."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, facecolor=PAPER, format="png")
    return path
