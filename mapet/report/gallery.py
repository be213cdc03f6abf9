"""A picture of what codebook entries stand for: each row is one entry, each cell a patch that has its token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from mapet.errors import DataError
from mapet.files import replacing
from mapet.words import in_line

CELL = 112
"""Side of a cell in pixels."""
GAP = 10
LABEL = 128
"""Width of the text at the left."""
HEADER = 84
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


class Images(Protocol):
    """uint8 images (n, 3, S, S): a tensor, an array, or what looks like one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor | np.ndarray: ...


def save_gallery(
    path: str | Path,
    images: Images,
    tokens: Tensor | np.ndarray,
    grid: int,
    *,
    entries: int | Sequence[int] = 12,
    columns: int = 8,
    title: str = "Patches that share a token",
    seed: int = 0,
) -> None:
    """Draw codebook entries and write the picture; the file name's suffix picks the format.

    The first column is the average patch of the entry. The others are patches of the entry, outlined in their
    surroundings, from as many different images as there are.

    Args:
        images: (n, 3, S, S) uint8; anything with a shape, a length and images by index.
        tokens: (n, grid * grid) integers, raster order.
        entries: how many, the most used first; or the ids to draw.
        columns: patches per entry.
        seed: picks the patches.

    Raises:
        DataError: images, tokens and grid do not fit together, or no entry to draw is used.
    """
    tokens = np.asarray(tokens)
    size = images.shape[-1]
    if len(images) == 0 or tokens.shape != (len(images), grid**2) or size % grid:
        raise DataError(
            f"a gallery needs images (n, 3, S, S) with S divisible by the grid and tokens (n, grid * grid); got images "
            f"{tuple(images.shape)}, tokens {tokens.shape} and grid {grid}"
        )
    counts = np.bincount(tokens.reshape(-1))
    wanted = most_used(counts, entries) if isinstance(entries, int) else list(entries)
    drawn = [entry for entry in wanted if 0 <= entry < len(counts) and counts[entry]]
    if not drawn or columns < 1:
        raise DataError(f"no patch to draw: none of the entries {entries} is used, or columns = {columns} is below 1")
    rows = [
        GalleryRow(f"entry {entry}", share_text(counts[entry], tokens.size), np.argwhere(tokens == entry))
        for entry in drawn
    ]
    in_use = np.count_nonzero(counts)
    subtitle = f"{len(drawn)} of the {in_use} entries in use, {len(images)} images of {grid} x {grid} patches"
    draw_gallery(path, images, rows, grid, columns=columns, title=title, subtitle=subtitle, seed=seed)


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


def draw_gallery(
    path: str | Path,
    images: Images,
    rows: Sequence[GalleryRow],
    grid: int,
    *,
    columns: int = 8,
    title: str,
    subtitle: str,
    seed: int = 0,
) -> None:
    """Draw rows of patches, as `save_gallery` does; only the images drawn are looked at."""
    canvas = _Canvas(len(rows), columns)
    rng = np.random.default_rng(seed)
    for i_row, row in enumerate(rows):
        places = _spread(row.places, rng)
        canvas.label(i_row, row.name, row.detail)
        canvas.average(i_row, _average_patch(images, places[:AVERAGED], grid))
        for column, (i_image, i_patch) in enumerate(places[:columns]):
            canvas.patch(i_row, column, *_in_context(_pixels(images, i_image), i_patch, grid))
    canvas.save(Path(path), title, subtitle)


def most_used(counts: np.ndarray, entries: int) -> list[int]:
    """Ids of at most so many entries that are used, the most used first, equal ones by id."""
    return [int(entry) for entry in np.argsort(-counts, kind="stable")[:entries] if counts[entry]]


def share_text(count: int, total: int) -> str:
    """How often an entry is used, for a label."""
    if count >= total / 1000:
        return f"{count / total:.2%} of patches"
    return "1 patch" if count == 1 else f"{count} patches"


def _spread(places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(m, 2) pairs image, patch in random order, one of every image before a second one of any."""
    places = places[rng.permutation(len(places))]
    _, first = np.unique(places[:, 0], return_index=True)
    is_first = np.zeros(len(places), dtype=bool)
    is_first[first] = True
    return np.concatenate([places[is_first], places[~is_first]])


def _pixels(images: Images, index: int) -> np.ndarray:
    """Image `index` as (S, S, 3) uint8."""
    return np.asarray(images[int(index)]).transpose(1, 2, 0)


def _average_patch(images: Images, places: np.ndarray, grid: int) -> np.ndarray:
    side = images.shape[-1] // grid
    total = np.zeros((side, side, 3))
    for i_image, i_patch in places:
        top, left = (int(i) * side for i in divmod(i_patch, grid))
        total += _pixels(images, i_image)[top : top + side, left : left + side]
    return (total / len(places)).round().astype(np.uint8)


def _in_context(pixels: np.ndarray, i_patch: int, grid: int) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A patch in its washed-out surroundings, and its left, top and side as parts of their side."""
    side, around = len(pixels) // grid, grid if grid <= WHOLE else CONTEXT
    row, column = divmod(int(i_patch), grid)
    top, left = (min(max(at - around // 2, 0), grid - around) for at in (row, column))
    window = pixels[top * side : (top + around) * side, left * side : (left + around) * side].astype(np.float64)
    y, x = (row - top) * side, (column - left) * side
    faded = window + FADE * (255 - window)
    faded[y : y + side, x : x + side] = window[y : y + side, x : x + side]
    return faded.round().astype(np.uint8), (x / len(window), y / len(window), side / len(window))


class _Canvas:
    """Cells are painted into one array, text and outlines drawn over it."""

    def __init__(self, rows: int, columns: int) -> None:
        self.width = LABEL + (columns + 1) * (CELL + GAP) + 3 * GAP
        self.height = HEADER + rows * (CELL + GAP) + GAP
        self.pixels = np.full((self.height, self.width, 3), 255, dtype=np.uint8)
        self.figure = Figure(figsize=(self.width / 100, self.height / 100), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        self.axes.axis("off")

    def label(self, row: int, name: str, detail: str) -> None:
        middle = self._top(row) + CELL / 2
        place = {"x": LABEL - GAP, "ha": "right", "va": "center", "parse_math": False}  # a name may hold a $
        self.axes.text(y=middle - 9, s=in_line(name), size=10, weight="bold", color=INK, **place)
        self.axes.text(y=middle + 9, s=in_line(detail), size=7.5, color=GREY, **place)

    def average(self, row: int, patch: np.ndarray) -> None:
        self._paint(patch, LABEL, self._top(row))
        self._outline(LABEL, self._top(row), CELL, GREY, 0.8)

    def patch(self, row: int, column: int, pixels: np.ndarray, place: tuple[float, float, float]) -> None:
        left, top = self._left(column), self._top(row)
        self._paint(pixels, left, top)
        x, y, side = (CELL * part for part in place)
        # White under the colour keeps the outline visible on any patch.
        self._outline(left + x, top + y, side, "white", 3.0)
        self._outline(left + x, top + y, side, OUTLINE, 1.6)

    def save(self, path: Path, title: str, subtitle: str) -> None:
        self.axes.imshow(self.pixels, extent=(0, self.width, self.height, 0), interpolation="none", zorder=0)
        self.axes.text(2 * GAP, 26, title, size=14, weight="bold", va="center", color=INK)
        self.axes.text(2 * GAP, 50, subtitle, size=9, va="center", color=GREY)
        self.axes.text(LABEL + CELL / 2, HEADER - 10, "average", size=8, ha="center", va="center", color=GREY)
        self.axes.text(self._left(0), HEADER - 10, "examples, outlined", size=8, va="center", color=GREY)
        FigureCanvasAgg(self.figure)
        with replacing(path) as partial:
            self.figure.savefig(partial, dpi=100, format="png")

    def _top(self, row: int) -> int:
        return HEADER + row * (CELL + GAP)

    def _left(self, column: int) -> int:
        return LABEL + (column + 1) * (CELL + GAP) + 2 * GAP

    def _paint(self, pixels: np.ndarray, left: int, top: int) -> None:
        # Few pixels are shown as the squares they are, a photograph smoothly.
        resample = Image.Resampling.NEAREST if len(pixels) < CELL / 3 else Image.Resampling.BICUBIC
        cell = Image.fromarray(pixels).resize((CELL, CELL), resample)
        self.pixels[top : top + CELL, left : left + CELL] = np.asarray(cell)

    def _outline(self, left: float, top: float, side: float, colour: str, width: float) -> None:
        self.axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=colour, linewidth=width))
