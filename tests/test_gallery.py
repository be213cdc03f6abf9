"""The gallery: which entries and patches it draws, and that they land in the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datafakes import description
from PIL import Image

from mapet.data.cache import TokenCache
from mapet.data.cache_writer import write_cache
from mapet.errors import DataError
from mapet.report import gallery
from mapet.report.gallery import draw_gallery, entry_rows


def flat_images(colours: list[list[tuple[int, int, int]]], patch: int = 4) -> torch.Tensor:
    """(n, 3, S, S) images whose patches, in raster order, have the given colours."""
    grid = int(len(colours[0]) ** 0.5)
    patches = torch.tensor(colours, dtype=torch.uint8).view(-1, grid, grid, 3)
    return patches.repeat_interleave(patch, 1).repeat_interleave(patch, 2).permute(0, 3, 1, 2)


RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
IMAGES = flat_images([[RED, RED, RED, GREEN], [RED, BLUE, GREEN, RED]])
TOKENS = torch.tensor([[5, 5, 5, 2], [5, 9, 2, 5]])
WORDS = {"title": "Entries", "subtitle": "of a test"}


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    write_cache(tmp_path / "cache", description(), IMAGES, TOKENS, ["a", "b"])
    return TokenCache.open(tmp_path / "cache")


def rows_of(cache: TokenCache, entries: list[int]) -> list[gallery.GalleryRow]:
    return entry_rows(cache.token_array, np.bincount(cache.token_array.ravel(), minlength=10), entries)


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour)).all(-1).any())


def average_of_row(picture: np.ndarray, row: int) -> tuple[int, ...]:
    top = gallery.HEADER + row * (gallery.CELL + gallery.GAP) + gallery.CELL // 2
    return tuple(picture[top, gallery.LABEL + gallery.CELL // 2])


def test_rows_are_entries_in_their_order(cache: TokenCache, tmp_path: Path) -> None:
    path = draw_gallery(tmp_path / "g.png", cache, rows_of(cache, [9, 5, 2]), **WORDS)
    picture = drawn(path)
    assert [average_of_row(picture, row) for row in range(3)] == [BLUE, RED, GREEN]
    assert has(picture, tuple(bytes.fromhex(gallery.OUTLINE[1:])))
    assert np.array_equal(
        picture, drawn(draw_gallery(tmp_path / "again.png", cache, rows_of(cache, [9, 5, 2]), **WORDS))
    )


def test_number_of_rows_and_patches_sets_the_size(cache: TokenCache, tmp_path: Path) -> None:
    """Entry 9 has one place, entry 5 has five; there are 4 columns at least."""
    small = drawn(draw_gallery(tmp_path / "a.png", cache, rows_of(cache, [9]), **WORDS))
    large = drawn(draw_gallery(tmp_path / "b.png", cache, rows_of(cache, [9, 5]), **WORDS))
    assert large.shape[0] - small.shape[0] == large.shape[1] - small.shape[1] == gallery.CELL + gallery.GAP
    assert small.shape[0] == gallery.HEADER + gallery.CELL + 2 * gallery.GAP


def test_labels_say_how_often(cache: TokenCache) -> None:
    assert [(row.name, row.detail) for row in rows_of(cache, [5, 9])] == [
        ("entry 5", "62.50% of patches"),
        ("entry 9", "12.50% of patches"),
    ]
    assert [gallery.share_text(count, 10**6) for count in (1, 2, 1000)] == ["1 patch", "2 patches", "0.10% of patches"]


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


@pytest.mark.parametrize("entries", [[], [7], [5, 7]])
def test_nothing_to_draw_is_refused_before_a_file_is_made(
    entries: list[int], cache: TokenCache, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no patch to draw"):
        draw_gallery(tmp_path / "g.png", cache, rows_of(cache, entries), **WORDS)
    assert not (tmp_path / "g.png").exists()
