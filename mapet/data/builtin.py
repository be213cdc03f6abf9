"""Real images that ship inside scikit-learn and scikit-image: no download, no network."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from mapet.data.decode import decode
from mapet.data.images import ImageSource, fingerprint_of
from mapet.errors import ConfigError, DataError

# Photographs only: scikit-image's drawings, masks, test patterns and the right half of the stereo pair are left out.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
LONGEST_SHORT_SIDE = 512  # so that no single photograph fills a set of tiles


class DigitSource(ImageSource):
    """scikit-learn's `load_digits`: 1,797 hand-written digits of 8x8 grey levels 0..16, here 0..255, labelled 0..9."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # (n, 8, 8) float in 0..16 -> uint8 in 0..255
        self.pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.labels: np.ndarray = digits.target.astype(np.int64)
        self.classes = [str(name) for name in digits.target_names]
        self.names = [f"digit_{index:04d}" for index in range(len(self.pixels))]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.pixels.tobytes() + self.labels.tobytes()).hexdigest()


class PhotoSource(ImageSource):
    """The photographs in the scikit-image wheel, whole or cut into square tiles; unlabelled.

    Photographs are first reduced to a shorter side of at most 512 pixels. Tiles are taken row by row from the top left;
    what does not fill a tile at the right and bottom is left out, and so is a photograph smaller than a tile.

    Args:
        tile: side of the tiles in pixels; 0 for whole photographs.
        stride: pixels from one tile to the next; 0 for `tile`, i.e. no overlap.
    Raises:
        DataError: scikit-image is not installed, or lacks its pictures.
        ConfigError: no photograph is as large as a tile.
    """

    def __init__(self, tile: int = 0, stride: int = 0) -> None:
        self.folder = _photograph_folder()
        self.tile, stride = tile, stride or tile
        self.boxes: list[tuple[str, tuple[int, int] | None]] = []
        self.names = []
        for name in PHOTOGRAPHS:
            for corner in _corners(_photograph(self.folder / name).size, tile, stride) if tile else [None]:
                self.boxes.append((name, corner))
                self.names.append(name if corner is None else f"{name}/{corner[1]:04d}_{corner[0]:04d}")
        if not self.names:
            raise ConfigError(
                f"photos: no photograph holds a tile of {tile} pixels; the largest is {LONGEST_SHORT_SIDE}"
            )

    def load(self, index: int) -> Image.Image:
        name, corner = self.boxes[index]
        image = _photograph(self.folder / name)
        if corner is None:
            return image.copy()
        left, top = corner
        return image.crop((left, top, left + self.tile, top + self.tile))

    def fingerprint(self) -> str:
        sizes = [f"{name} {(self.folder / name).stat().st_size}" for name in PHOTOGRAPHS]
        return fingerprint_of([*sizes, f"tile {self.tile}", *self.names])


def _corners(size: tuple[int, int], tile: int, stride: int) -> list[tuple[int, int]]:
    """(left, top) of the tiles of an image of (width, height), row by row."""
    width, height = size
    return [(left, top) for top in range(0, height - tile + 1, stride) for left in range(0, width - tile + 1, stride)]


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _photograph(path: Path) -> Image.Image:
    image = decode(path)
    shrink = LONGEST_SHORT_SIDE / min(image.size)
    if shrink >= 1:
        return image
    return image.resize((round(image.width * shrink), round(image.height * shrink)), Image.Resampling.BICUBIC)


def _photograph_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError("photos: scikit-image is not installed; install it with: pip install 'mapet[demo]'")
    folder = Path(spec.origin).parent / "data"
    if missing := [name for name in PHOTOGRAPHS if not (folder / name).is_file()]:
        raise DataError(
            f"photos: this scikit-image does not bundle {', '.join(missing)}; install scikit-image from its wheel"
        )
    return folder
