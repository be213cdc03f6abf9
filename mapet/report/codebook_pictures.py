"""The picture of how often the entries of a codebook are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mapet.report.picture import CONTEXT, FAINT, HIDDEN, INK, QUERY, frame, save
from mapet.tokenizers.usage import CodebookUsage


def draw_usage(path: str | Path, usage: CodebookUsage) -> Path:
    """Draw the entries' counts, sorted, and how many entries cover how much of the tokens."""
    counts = np.sort(usage.counts)[::-1]
    used = np.count_nonzero(counts)
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_counts(left, usage, counts, used)
    _draw_cover(right, usage, counts, used)
    return save(figure, path)


def _draw_counts(axes: Axes, usage: CodebookUsage, counts: np.ndarray, used: int) -> None:
    rank = np.arange(1, used + 1)
    even = usage.total / usage.vocabulary
    bottom = max(0.5, counts[used - 1] / 3)
    axes.fill_between(rank, counts[:used], bottom, step="mid", color=CONTEXT, alpha=0.22, linewidth=0)
    axes.step(rank, counts[:used], where="mid", color=CONTEXT, linewidth=1.8)
    axes.axhline(even, color=INK, linewidth=1.1, linestyle="--")
    axes.annotate(
        f"even use: {even:,.0f}",
        (0, even),
        xycoords=("axes fraction", "data"),
        xytext=(5, -12),
        textcoords="offset points",
        size=9,
        color=INK,
    )
    if used < usage.vocabulary:
        axes.axvspan(used + 0.5, usage.vocabulary + 0.5, color=HIDDEN)
        axes.axvline(used + 0.5, color=QUERY, linewidth=1.2)
        axes.annotate(
            f"{usage.vocabulary - used:,} never used",
            (used + 0.5, 0.94),
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            size=9,
            color=QUERY,
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom, 2.2 * counts[0])
    axes.set_xlim(0.5, usage.vocabulary + 0.5)
    _style(axes, "How often each entry is used", "entries, the most used first", "tokens (log scale)")


def _draw_cover(axes: Axes, usage: CodebookUsage, counts: np.ndarray, used: int) -> None:
    cover = np.concatenate([[0], np.cumsum(counts) / max(usage.total, 1)])
    axes.plot([0, usage.vocabulary], [0, 100], color=INK, linewidth=1.1, linestyle="--")
    axes.plot(np.arange(len(cover)), 100 * cover, color=CONTEXT, linewidth=1.8)
    half = int(np.searchsorted(cover, 0.5))
    axes.plot([half, half, 0], [0, 50, 50], color=FAINT, linewidth=1)
    axes.plot([half], [50], "o", color=CONTEXT, markersize=5)
    axes.text(0.98, 0.03, f"{half:,} entries make up half", transform=axes.transAxes, ha="right", size=9, color=INK)
    axes.set_xlim(0, usage.vocabulary)
    axes.set_ylim(0, 101)
    _style(axes, f"Perplexity {usage.perplexity:,.1f} of {usage.vocabulary:,}", "entries", "tokens covered (%)")


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", size=12, weight="bold", color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    frame(axes, "y")
