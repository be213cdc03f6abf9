"""The picture of who sees whom: content and query stream, in permuted order and in image order.

The rule is `mapet_kernels.visibility`; nothing is decided here but order, colours and words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from mapet.report.picture import CONTEXT, FAINT, HIDDEN, INK, MASK, PAPER, QUERY, TARGET, save
from mapet_kernels.visibility import two_stream_visibility

GRID = 4
TOKENS = GRID**2 + 1
COLOURS = {"A": CONTEXT, "B": TARGET, "M": MASK, "G": QUERY}
WORDS = {"A": "A  context", "B": "B  targets", "M": "M  mask tokens"}


class Matrix(NamedTuple):
    """One panel: which of its rows sees which key, bool (rows, keys); group letters and names of rows and keys."""

    title: str
    visible: np.ndarray
    row_groups: np.ndarray
    row_names: list[str]
    key_groups: np.ndarray
    key_names: list[str]
    own: np.ndarray  # for every row, the key that is its own content
    letters: bool  # whether groups lie together, so that each can be labelled once


def draw_who_sees_whom(path: str | Path, *, cut: int = 6, seed: int = 4) -> Path:
    """Draw both streams for an image of 4 x 4 patches and a class token (N = 17), of which `cut` are not predicted."""
    permutation = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(TOKENS - 1)])
    figure = Figure(figsize=(15.2, 10.3), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.14))
    title = f"Who sees whom in MaPeT: {TOKENS} tokens ({GRID} x {GRID} patches and a class token), cut c = {cut}"
    figure.suptitle(title, fontsize=15, color=INK, fontweight="bold")
    axes = figure.subplots(2, 3, width_ratios=[1, 1, 0.42], height_ratios=[2 * TOKENS - cut, TOKENS - cut])
    for place, panel in zip((axes[0, 0], axes[1, 0], axes[0, 1], axes[1, 1]), panels(permutation, cut), strict=True):
        _draw_matrix(place, panel)
    _draw_patches(axes[0, 2], np.argsort(permutation), cut)
    _draw_legend(axes[1, 2])
    return save(figure, path)


def panels(permutation: np.ndarray, cut: int) -> list[Matrix]:
    """Content and query stream in permuted order, then both in image order.

    permutation: (N,), the token of every rank; the class token has rank 0.
    """
    ranks = np.concatenate([np.arange(TOKENS), np.arange(cut, TOKENS)])  # of the keys A, B, M
    groups = np.array(["A"] * cut + ["B"] * (TOKENS - cut) + ["M"] * (TOKENS - cut))
    drawn = []
    for title, keys, queries, numbers, letter in (
        ("Permuted order", np.arange(len(ranks)), np.arange(TOKENS - cut), np.arange(TOKENS) + 1, "z"),
        ("The same in image order", *image_order(permutation, cut), permutation, "p"),
    ):
        tokens, targets = numbers[ranks[keys]], numbers[cut:][queries]
        names = [("m" if key >= TOKENS else letter) + str(token) for key, token in zip(keys, tokens, strict=True)]
        names = ["cls" if name == "p0" else name for name in names]
        place_of_rank = np.argsort(keys)[:TOKENS]
        content, query = (mask.numpy() for mask in two_stream_visibility(TOKENS, cut))
        for stream, visible, row_groups, row_names, row_ranks in (
            ("content", content[keys], groups[keys], names, ranks[keys]),
            ("query", query[queries], np.full(len(queries), "G"), [f"g{t}" for t in targets], queries + cut),
        ):
            own, shown = place_of_rank[row_ranks], visible[:, keys]
            name = f"{title}: {stream} stream"
            drawn.append(Matrix(name, shown, row_groups, row_names, groups[keys], names, own, letter == "z"))
    return drawn


def image_order(permutation: np.ndarray, cut: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in A, B, M of the keys in image order, and of the queries: N tokens, then the targets' masks, raster."""
    rank = np.argsort(permutation)
    targets = rank[rank >= cut] - cut
    return np.concatenate([rank, len(rank) + targets]), targets


def _draw_matrix(axes: Axes, panel: Matrix) -> None:
    rows, keys = panel.visible.shape
    colours = np.array([to_rgb(COLOURS[group]) for group in panel.key_groups])
    axes.imshow(np.where(panel.visible[..., None], colours, to_rgb(HIDDEN)), interpolation="nearest")
    seen = panel.visible[np.arange(rows), panel.own]
    faces = np.where(seen[:, None], (*to_rgb(PAPER), 1.0), 0.0)
    edges = np.where(seen[:, None], to_rgb(PAPER), to_rgb(FAINT))
    axes.scatter(panel.own, np.arange(rows), s=13, linewidths=0.9, facecolors=faces, edgecolors=edges)
    axes.set_xticks(np.arange(keys), panel.key_names, fontsize=6.5, rotation=90, color=INK)
    axes.set_yticks(np.arange(rows), panel.row_names, fontsize=6.5, color=INK)
    axes.tick_params(length=0, pad=13)
    axes.set_xticks(np.arange(keys + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=1.1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    _title(axes, panel.title)
    for i, group in enumerate(panel.row_groups):
        axes.add_patch(Rectangle((-1.25, i - 0.5), 0.5, 1, color=COLOURS[group], lw=0, clip_on=False))
    for i, group in enumerate(panel.key_groups):
        axes.add_patch(Rectangle((i - 0.5, rows - 0.25), 1, 0.5, color=COLOURS[group], lw=0, clip_on=False))
    for groups, line in ((panel.key_groups, axes.axvline), (panel.row_groups, axes.axhline)):
        parts = groups if panel.letters else groups == "M"
        for start in np.flatnonzero(parts[1:] != parts[:-1]):
            line(start + 0.5, color=INK, linewidth=1.3)
    for group in COLOURS if panel.letters else ():
        style: dict[str, Any] = {"va": "center", "color": COLOURS[group], "fontsize": 12}
        if (at := np.flatnonzero(panel.row_groups == group)).size:
            axes.text(keys - 0.2, at.mean(), group, **style)
        if (at := np.flatnonzero(panel.key_groups == group)).size:
            axes.text(at.mean(), -0.75, WORDS[group], ha="center", **style | {"va": "bottom", "fontsize": 10})


def _title(axes: Axes, title: str) -> None:
    axes.set_anchor("N")
    axes.set_title(title, fontsize=12, color=INK, loc="left", pad=24)


def _draw_patches(axes: Axes, rank: np.ndarray, cut: int) -> None:
    """The image: every patch with its name and its place in the permuted order."""
    for token in range(1, TOKENS):
        row, column = divmod(token - 1, GRID)
        axes.add_patch(Rectangle((column, row), 0.94, 0.94, color=COLOURS["A" if rank[token] < cut else "B"], lw=0))
        centre: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 12}
        axes.text(column + 0.47, row + 0.47, f"z{rank[token] + 1}", color=PAPER, **centre)
        axes.text(column + 0.07, row + 0.17, f"p{token}", color=PAPER, fontsize=6.5, alpha=0.85)
    axes.set(xlim=(-0.05, GRID), ylim=(GRID + 0.05, 0), aspect="equal")
    _title(axes, "The image")
    words = (
        f"Each patch p has a place z in a\nrandom order; the class token is z1.\nz1 to z{cut} are context,"
        f" the other {TOKENS - cut}\nare predicted, in the order z."
    )
    axes.text(0, GRID + 0.25, words, va="top", color=INK, fontsize=9)
    axes.axis("off")


def _draw_legend(axes: Axes) -> None:
    patches = {
        "sees context (A)": CONTEXT,
        "sees the content of a target (B)": TARGET,
        "sees a mask token (M)": MASK,
        "does not see": HIDDEN,
        "query row (G)": QUERY,
    }
    circle: dict[str, Any] = {"marker": "o", "ls": "", "color": FAINT, "ms": 4}
    handles = [
        *(Patch(color=colour, label=label) for label, colour in patches.items()),
        Line2D([], [], mfc=FAINT, label="its own content, seen", **circle),
        Line2D([], [], mfc="none", label="its own content, hidden", **circle),
    ]
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=9, labelcolor=INK, borderaxespad=0)
    axes.axis("off")
