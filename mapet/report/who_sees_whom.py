"""The picture of who sees whom: content and query stream, in permuted order and in image order.

The rule is `mapet_kernels.visibility`; nothing is decided here but order, colours and words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from mapet.report.picture import CONTEXT, FAINT, HIDDEN, INK, MASK, PAPER, QUERY, TARGET, save
from mapet_kernels.visibility import two_stream_visibility

GRID = 4
TOKENS = GRID**2 + 1
GROUP_COLOURS = {"A": CONTEXT, "B": TARGET, "M": MASK, "G": QUERY}


@dataclass(frozen=True)
class Matrix:
    """One panel: which row sees which key, and what rows and keys are."""

    title: str
    visible: np.ndarray
    """bool (rows, keys)"""
    row_groups: np.ndarray
    row_names: list[str]
    key_groups: np.ndarray
    key_names: list[str]
    own: np.ndarray
    """For every row, the key that is its own content."""
    letters: bool
    """Whether groups lie together, so that each can be labelled once."""


def draw_who_sees_whom(path: str | Path, *, cut: int = 6, seed: int = 4) -> Path:
    """Draw both streams for an image of 4 x 4 patches and a class token (N = 17), of which `cut` are not predicted."""
    permutation = example_permutation(TOKENS, seed)
    figure = Figure(figsize=(15.2, 10.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.14)
    figure.suptitle(
        f"Who sees whom in MaPeT: {TOKENS} tokens ({GRID} x {GRID} patches and a class token), cut c = {cut}",
        fontsize=15,
        color=INK,
        fontweight="bold",
    )
    targets = TOKENS - cut
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 0.42], height_ratios=[TOKENS + targets, targets])
    panels = [*permuted_panels(cut), *image_panels(permutation, cut)]
    for place, panel in zip([(0, 0), (1, 0), (0, 1), (1, 1)], panels, strict=True):
        _draw_matrix(figure.add_subplot(grid[place]), panel)
    _draw_patches(figure.add_subplot(grid[0, 2]), np.argsort(permutation), cut)
    _draw_legend(figure.add_subplot(grid[1, 2]))
    return save(figure, path)


def example_permutation(tokens: int, seed: int) -> np.ndarray:
    """Token indices in permuted order, the class token first: entry r is the token of rank r."""
    return np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(tokens - 1)])


def image_order(permutation: np.ndarray, cut: int) -> np.ndarray:
    """Places in A, B, M of the keys in image order: N tokens, then the mask tokens of the targets, raster order."""
    rank = np.argsort(permutation)
    return np.concatenate([rank, len(rank) + rank[rank >= cut] - cut])


def to_image_order(
    content: np.ndarray, query: np.ndarray, permutation: np.ndarray, cut: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both masks, rows and keys, from permuted order (A, B, M) to image order."""
    order = image_order(permutation, cut)
    rank = np.argsort(permutation)
    return content[np.ix_(order, order)], query[np.ix_(rank[rank >= cut] - cut, order)]


def permuted_panels(cut: int) -> tuple[Matrix, Matrix]:
    """Content and query stream in permuted order."""
    content, query = (mask.numpy() for mask in two_stream_visibility(TOKENS, cut))
    groups, names, ranks = _keys(cut)
    content_own = np.concatenate([np.arange(TOKENS), np.arange(cut, TOKENS)])
    query_names = [f"g{rank}" for rank in ranks[cut:TOKENS]]
    query_groups = np.full(len(query), "G")
    return (
        Matrix("Permuted order: content stream", content, groups, names, groups, names, content_own, letters=True),
        Matrix(
            "Permuted order: query stream",
            query,
            query_groups,
            query_names,
            groups,
            names,
            np.arange(cut, TOKENS),
            letters=True,
        ),
    )


def image_panels(permutation: np.ndarray, cut: int) -> tuple[Matrix, Matrix]:
    """The same two masks with tokens, mask tokens and queries in the order of the image."""
    masks = (mask.numpy() for mask in two_stream_visibility(TOKENS, cut))
    content, query = to_image_order(*masks, permutation, cut)
    groups = _keys(cut)[0][image_order(permutation, cut)]
    targets = np.flatnonzero(np.argsort(permutation) >= cut)
    names = ["cls", *(f"p{t}" for t in range(1, TOKENS)), *(f"m{t}" for t in targets)]
    query_names, query_groups = [f"g{t}" for t in targets], np.full(len(query), "G")
    content_own = np.concatenate([np.arange(TOKENS), targets])
    return (
        Matrix("The same in image order: content stream", content, groups, names, groups, names, content_own, False),
        Matrix(
            "The same in image order: query stream",
            query,
            query_groups,
            query_names,
            groups,
            names,
            targets,
            letters=False,
        ),
    )


def _keys(cut: int) -> tuple[np.ndarray, list[str], list[int]]:
    """Group, name and rank (counted from 1) of every key in permuted order."""
    targets = TOKENS - cut
    groups = np.array(["A"] * cut + ["B"] * targets + ["M"] * targets)
    ranks = [*range(1, TOKENS + 1), *range(cut + 1, TOKENS + 1)]
    names = [("m" if group == "M" else "z") + str(rank) for group, rank in zip(groups, ranks, strict=True)]
    return groups, names, ranks


def _draw_matrix(axes: Axes, panel: Matrix) -> None:
    rows, keys = panel.visible.shape
    colours = np.array([to_rgb(GROUP_COLOURS[group]) for group in panel.key_groups])
    axes.imshow(np.where(panel.visible[..., None], colours[None], to_rgb(HIDDEN)), interpolation="nearest")
    for sees, marker in ((True, {"facecolors": PAPER, "edgecolors": PAPER}), (False, {"facecolors": "none"})):
        here = np.flatnonzero(panel.visible[np.arange(rows), panel.own] == sees)
        axes.scatter(panel.own[here], here, s=13, linewidths=0.9, **({"edgecolors": FAINT} | marker))
    axes.set_xticks(np.arange(keys), panel.key_names, fontsize=6.5, rotation=90, color=INK)
    axes.set_yticks(np.arange(rows), panel.row_names, fontsize=6.5, color=INK)
    axes.tick_params(length=0, pad=13)
    axes.set_xticks(np.arange(keys + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=1.1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")
    axes.set_title(panel.title, fontsize=12, color=INK, loc="left", pad=24)
    _draw_groups(axes, panel)


def _draw_groups(axes: Axes, panel: Matrix) -> None:
    """Coloured strips beside rows and keys; where groups lie together, their letters and lines between them."""
    rows, keys = panel.visible.shape
    for i, group in enumerate(panel.row_groups):
        axes.add_patch(Rectangle((-1.25, i - 0.5), 0.5, 1, color=GROUP_COLOURS[group], lw=0, clip_on=False))
    for i, group in enumerate(panel.key_groups):
        axes.add_patch(Rectangle((i - 0.5, rows - 0.25), 1, 0.5, color=GROUP_COLOURS[group], lw=0, clip_on=False))
    for start in _starts(panel.key_groups == "M" if not panel.letters else panel.key_groups)[1:]:
        axes.axvline(start - 0.5, color=INK, linewidth=1.3)
    for start in _starts(panel.row_groups == "M" if not panel.letters else panel.row_groups)[1:]:
        axes.axhline(start - 0.5, color=INK, linewidth=1.3)
    if not panel.letters:
        return
    words = {"A": "A  context", "B": "B  targets", "M": "M  mask tokens"}
    for start, stop in _spans(panel.key_groups):
        group = panel.key_groups[start]
        axes.text(
            (start + stop - 1) / 2,
            -0.75,
            words[group],
            ha="center",
            va="bottom",
            color=GROUP_COLOURS[group],
            fontsize=10,
        )
    for start, stop in _spans(panel.row_groups):
        group = panel.row_groups[start]
        axes.text(keys - 0.2, (start + stop - 1) / 2, group, va="center", color=GROUP_COLOURS[group], fontsize=12)


def _starts(groups: np.ndarray) -> list[int]:
    return [0, *(np.flatnonzero(groups[1:] != groups[:-1]) + 1).tolist()]


def _spans(groups: np.ndarray) -> list[tuple[int, int]]:
    starts = _starts(groups)
    return list(zip(starts, [*starts[1:], len(groups)], strict=True))


def _draw_patches(axes: Axes, rank: np.ndarray, cut: int) -> None:
    """The image: every patch with its name and its place in the permuted order."""
    for token in range(1, TOKENS):
        row, column = divmod(token - 1, GRID)
        colour = GROUP_COLOURS["A" if rank[token] < cut else "B"]
        axes.add_patch(Rectangle((column, row), 0.94, 0.94, color=colour, lw=0))
        centre = (column + 0.47, row + 0.47)
        axes.annotate(f"z{rank[token] + 1}", centre, ha="center", va="center", color=PAPER, fontsize=12)
        axes.annotate(f"p{token}", (column + 0.07, row + 0.17), color=PAPER, fontsize=6.5, alpha=0.85)
    axes.set(xlim=(-0.05, GRID), ylim=(GRID + 0.05, 0), aspect="equal")
    axes.set_anchor("N")
    axes.set_title("The image", fontsize=12, color=INK, loc="left", pad=24)
    axes.text(
        0,
        GRID + 0.25,
        f"Each patch p has a place z in a\nrandom order; the class token is z1.\nz1 to z{cut} are context,"
        f" the other {TOKENS - cut}\nare predicted, in the order z.",
        va="top",
        color=INK,
        fontsize=9,
    )
    axes.axis("off")


def _draw_legend(axes: Axes) -> None:
    handles = [
        Patch(color=CONTEXT, label="sees context (A)"),
        Patch(color=TARGET, label="sees the content of a target (B)"),
        Patch(color=MASK, label="sees a mask token (M)"),
        Patch(color=HIDDEN, label="does not see"),
        Patch(color=QUERY, label="query row (G)"),
        Line2D([], [], marker="o", ls="", color=FAINT, mfc=FAINT, ms=4, label="its own content, seen"),
        Line2D([], [], marker="o", ls="", color=FAINT, mfc="none", ms=4, label="its own content, hidden"),
    ]
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=9, labelcolor=INK, borderaxespad=0)
    axes.axis("off")
