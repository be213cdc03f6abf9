"""The gallery: which entries and patches it draws, and that they land in the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mapet.errors import DataError
from mapet.report import gallery
from mapet.report.gallery import save_gallery


def flat_images(colours: list[list[tuple[int, int, int]]], patch: int = 8) -> torch.Tensor:
    """(n, 3, S, S) images whose patches, in raster order, have the given colours."""
    grid = int(len(colours[0]) ** 0.5)
    patches = torch.tensor(colours, dtype=torch.uint8).view(-1, grid, grid, 3)
    return patches.repeat_interleave(patch, 1).repeat_interleave(patch, 2).permute(0, 3, 1, 2)


RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
IMAGES = flat_images([[RED, RED, RED, GREEN], [RED, BLUE, GREEN, RED]])
TOKENS = torch.tensor([[5, 5, 5, 2], [5, 9, 2, 5]])


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour)).all(-1).any())


def average_of_row(picture: np.ndarray, row: int) -> tuple[int, ...]:
    top = gallery.HEADER + row * (gallery.CELL + gallery.GAP) + gallery.CELL // 2
    return tuple(picture[top, gallery.LABEL + gallery.CELL // 2])


def test_rows_are_entries_the_most_used_first(tmp_path: Path) -> None:
    save_gallery(tmp_path / "g.png", IMAGES, TOKENS, 2, columns=3)
    picture = drawn(tmp_path / "g.png")
    assert [average_of_row(picture, row) for row in range(3)] == [RED, GREEN, BLUE]
    assert has(picture, tuple(bytes.fromhex(gallery.OUTLINE[1:])))


def test_number_of_entries_and_columns_sets_the_size(tmp_path: Path) -> None:
    save_gallery(tmp_path / "a.png", IMAGES, TOKENS, 2, entries=1, columns=2)
    save_gallery(tmp_path / "b.png", IMAGES, TOKENS, 2, entries=3, columns=4)
    small, large = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png")
    assert large.shape[0] - small.shape[0] == large.shape[1] - small.shape[1] == 2 * (gallery.CELL + gallery.GAP)
    assert average_of_row(small, 0) == RED


def test_chosen_entries_in_their_order_without_unused_ones(tmp_path: Path) -> None:
    save_gallery(tmp_path / "g.png", IMAGES, TOKENS.numpy().astype(np.uint16), 2, entries=[9, 4, 2])
    picture = drawn(tmp_path / "g.png")
    assert [average_of_row(picture, row) for row in range(2)] == [BLUE, GREEN]
    assert picture.shape[0] == gallery.HEADER + 2 * (gallery.CELL + gallery.GAP) + gallery.GAP


def test_the_same_picture_every_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_gallery(tmp_path / name, IMAGES, TOKENS, 2)
    assert np.array_equal(drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png"))


def test_examples_come_from_as_many_images_as_there_are() -> None:
    places = np.array([[image, patch] for image in range(5) for patch in range(20)])
    spread = gallery._spread(places, np.random.default_rng(0))
    assert sorted(spread[:5, 0].tolist()) == [0, 1, 2, 3, 4]
    assert sorted(map(tuple, spread.tolist())) == sorted(map(tuple, places.tolist()))


@pytest.mark.parametrize("i_patch", [0, 9, 90, 99, 45, 37])
def test_context_keeps_the_patch_as_it_is_and_inside_the_image(i_patch: int) -> None:
    pixels = np.random.default_rng(0).integers(255, size=(40, 40, 3), dtype=np.uint8)
    window, (x, y, side) = gallery._in_context(pixels, i_patch, 10)
    side_shown = 4 * gallery.CONTEXT
    assert window.shape == (side_shown, side_shown, 3)
    left, top, size = (round(side_shown * part) for part in (x, y, side))
    row, column = divmod(i_patch, 10)
    patch = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    assert size == 4
    assert np.array_equal(window[top : top + 4, left : left + 4], patch)
    assert window.mean() > pixels.mean() + 20


def test_small_grids_show_the_whole_image() -> None:
    window, place = gallery._in_context(np.zeros((8, 8, 3), dtype=np.uint8), 6, 4)
    assert window.shape == (8, 8, 3)
    assert place == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": TOKENS[:1]}, r"got images \(2, 3, 16, 16\), tokens \(1, 4\) and grid 2"),
        ({"grid": 3}, "S divisible by the grid"),
        ({"entries": [77]}, r"none of the entries \[77\] is used"),
        ({"entries": 0}, "no patch to draw"),
        ({"columns": 0}, "columns = 0 is below 1"),
        ({"images": IMAGES[:0], "tokens": TOKENS[:0]}, "a gallery needs images"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_file_is_made(tmp_path: Path, changes: dict, message: str) -> None:
    arguments = {"images": IMAGES, "tokens": TOKENS, "grid": 2, **changes}
    with pytest.raises(DataError, match=message):
        save_gallery(tmp_path / "g.png", **arguments)
    assert not list(tmp_path.iterdir())
