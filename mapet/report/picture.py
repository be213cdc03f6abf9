"""Colours and axes of every picture, saving one without a display, and what a report says of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Picture:
    """A picture that a report shows, and what is to be seen on it."""

    path: Path
    caption: str

    def markdown(self, folder: Path) -> list[str]:
        """Its lines in a report that is written into `folder`."""
        return [f"![{self.path.stem}]({Path(os.path.relpath(self.path, folder)).as_posix()})", "", self.caption]


def frame(axes: Axes, grid: Literal["x", "y", "both"] = "both", *, title: str = "", x: str = "", y: str = "") -> None:
    """A light grid behind what is drawn, no lines above it and to its right, and the words around it."""
    axes.grid(axis=grid, color=FAINT, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.set_title(title or axes.get_title("left"), loc="left", fontsize=12, color=INK, fontweight="bold")
    axes.set_xlabel(x or axes.get_xlabel(), color=INK)
    axes.set_ylabel(y or axes.get_ylabel(), color=INK)


def save(figure: Figure, path: str | Path, *, dpi: int = 160) -> Path:
    """Write a PNG, whole or not at all, making its folder; the path is returned."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, facecolor=PAPER, format="png")
    return path
