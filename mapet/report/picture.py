"""Colours of every picture, and saving one without a display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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


def save(figure: Figure, path: str | Path, *, dpi: int = 160) -> Path:
    """Write a PNG, making its folder; the path is returned."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=dpi, facecolor=PAPER)
    return path
