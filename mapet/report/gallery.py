"""A picture of what codebook entries stand for: each row is one entry, each cell a patch that has its token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mapet.data.cache import TokenCache
from mapet.errors import DataError
from mapet.report.picture import save
from mapet.words import in_line

CELL = 112
"""Side of a cell in pixels."""
GAP = 10
LABEL = 128
"""Width of the text at the left."""
HEADER = 84
COLUMNS = 8
"""Patches of a row, at most."""
CONTEXT = 5
"""Patches along the side of a cell, the one in question among them;"""
WHOLE = 6
"""but an image of no more patches than this along its side is shown whole."""
FADE = 0.45
"""How far the surroundings of a patch are washed out to white."""
AVERAGED = 256
"""Patches that the average in the first column is taken over, at most."""
OUTLINE = "#d6262b"
INK, GREY = "#1a1a1a", "#6b6b6b"


@dataclass(frozen=True)
class GalleryRow:
    """One row of a gallery.

    Attributes:
        name, detail: two lines of text at the left.
        places: (m, 2) pairs of image and patch to draw from.
    """

    name: str
    detail: str
    places: np.ndarray


def entry_rows(tokens: np.ndarray, counts: np.ndarray, entries: Sequence[int]) -> list[GalleryRow]:
    """Rows of codebook entries, from all tokens (n, P) and the uses of every entry (K,)."""
    return [
        GalleryRow(f"entry {entry}", share_text(int(counts[entry]), tokens.size), np.argwhere(tokens == entry))
        for entry in entries
    ]


def share_text(count: int, total: int) -> str:
    """How often an entry is used, for a label."""
    if count >= total / 1000:
        return f"{count / total:.2%} of patches"
    return "1 patch" if count == 1 else f"{count} patches"


def draw_gallery(
    path: str | Path, cache: TokenCache, rows: Sequence[GalleryRow], *, title: str, subtitle: str, seed: int = 0
) -> Path:
    """Draw rows of patches of a cache's images; the path is returned. Only the images drawn are looked at.

    The first column is the average patch of the row. The others are its patches, picked by `seed`, outlined in their
    surroundings, from as many different images as there are. DataError where there is nothing to draw.
    """
    if not rows or not all(len(row.places) for row in rows):
        raise DataError(f"no patch to draw on {path}: none of its entries, or not all of them, are used")
    step, rng = CELL + GAP, np.random.default_rng(seed)
    columns = min(COLUMNS, max(4, *(len(row.places) for row in rows)))
    width, height = LABEL + (columns + 1) * step + 3 * GAP, HEADER + len(rows) * step + GAP
    # Cells are painted into one array, text and outlines drawn over it.
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")

    def paint(pixels: np.ndarray, left: int, top: int) -> None:
        # Few pixels are shown as the squares they are, a photograph smoothly.
        resample = Image.Resampling.NEAREST if len(pixels) < CELL / 3 else Image.Resampling.BICUBIC
        canvas[top : top + CELL, left : left + CELL] = Image.fromarray(pixels).resize((CELL, CELL), resample)

    def outline(left: float, top: float, side: float, colour: str, line: float) -> None:
        axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=colour, linewidth=line))

    def write(left: float, top: float, text: str, **style: Any) -> None:
        axes.text(left, top, in_line(text), va="center", parse_math=False, **style)  # a name may hold a $

    for i, row in enumerate(rows):
        top, places = HEADER + i * step, _spread(row.places, rng)
        write(LABEL - GAP, top + CELL / 2 - 9, row.name, size=10, weight="bold", color=INK, ha="right")
        write(LABEL - GAP, top + CELL / 2 + 9, row.detail, size=7.5, color=GREY, ha="right")
        paint(_average_patch(cache, places[:AVERAGED]), LABEL, top)
        outline(LABEL, top, CELL, GREY, 0.8)
        for column, (image, patch) in enumerate(places[:columns], start=1):
            left = LABEL + column * step + 2 * GAP
            pixels, place = _in_context(_pixels(cache, image), patch, cache.grid)
            paint(pixels, left, top)
            x, y, side = (CELL * part for part in place)
            for colour, line in (("white", 3.0), (OUTLINE, 1.6)):  # white keeps it visible on any patch
                outline(left + x, top + y, side, colour, line)
    axes.imshow(canvas, extent=(0, width, height, 0), interpolation="none", zorder=0)
    write(2 * GAP, 26, title, size=14, weight="bold", color=INK)
    write(2 * GAP, 50, subtitle, size=9, color=GREY)
    write(LABEL + CELL / 2, HEADER - 10, "average", size=8, color=GREY, ha="center")
    write(LABEL + step + 2 * GAP, HEADER - 10, "examples, outlined", size=8, color=GREY)
    return save(figure, path, dpi=100)


def _spread(places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(m, 2) pairs image, patch in random order, one of every image before a second one of any."""
    places = places[rng.permutation(len(places))]
    _, first = np.unique(places[:, 0], return_index=True)
    is_first = np.zeros(len(places), dtype=bool)
    is_first[first] = True
    return np.concatenate([places[is_first], places[~is_first]])


def _pixels(cache: TokenCache, image: int) -> np.ndarray:
    """An image as (S, S, 3) uint8."""
    return cache.images([int(image)])[0].permute(1, 2, 0).numpy()


def _average_patch(cache: TokenCache, places: np.ndarray) -> np.ndarray:
    side = cache.image_size // cache.grid
    total = np.zeros((side, side, 3))
    for image, patch in places:
        top, left = (int(i) * side for i in divmod(patch, cache.grid))
        total += _pixels(cache, image)[top : top + side, left : left + side]
    return (total / len(places)).round().astype(np.uint8)


def _in_context(pixels: np.ndarray, patch: int, grid: int) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A patch in its washed-out surroundings, and its left, top and side as parts of their side."""
    side, around = len(pixels) // grid, grid if grid <= WHOLE else CONTEXT
    row, column = divmod(int(patch), grid)
    top, left = (min(max(at - around // 2, 0), grid - around) for at in (row, column))
    window = pixels[top * side : (top + around) * side, left * side : (left + around) * side].astype(np.float64)
    y, x = (row - top) * side, (column - left) * side
    faded = window + FADE * (255 - window)
    faded[y : y + side, x : x + side] = window[y : y + side, x : x + side]
    return faded.round().astype(np.uint8), (x / len(window), y / len(window), side / len(window))
