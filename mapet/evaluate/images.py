"""What evaluation reads images from: `mapet.data.images.Images`, tensors, and random views of either."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from mapet.data import images as data
from mapet.data.cache import TokenCache

Images: TypeAlias = "data.Images | RandomViews | Tensor | np.ndarray"
"""Anything with a length whose slices are uint8 images (b, 3, S, S)."""


def as_tensor(images: Tensor | np.ndarray) -> Tensor:
    """A slice of `Images` as a uint8 tensor. Raises TypeError or ValueError when it is not uint8 (b, 3, S, S)."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must have shape (n, 3, size, size), got {tuple(images.shape)}")
    return images


class SourceImages(data.Some):
    """Centre squares of the images `ids` of a source, `size` pixels wide, loaded as they are needed."""

    def __init__(self, source: data.ImageSource, size: int, ids: np.ndarray) -> None:
        super().__init__(data.Squares(source, size), ids)


class CacheImages(data.Some):
    """The images `ids` of a token cache, as they were cropped for pre-training."""

    def __init__(self, cache: TokenCache, ids: np.ndarray) -> None:
        super().__init__(cache, ids)


@dataclass(frozen=True)
class RandomViews:
    """Random resized crop and horizontal flip, as the paper's linear probe trains on (BEiT's script, its defaults).

    Image i always gets the crop drawn from (seed, view, i), whatever the batches.
    """

    images: Images
    view: int
    seed: int = 0
    smallest_area: float = 0.08

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice) -> Tensor:
        ids = range(*which.indices(len(self)))
        return torch.stack([self._draw(image, i) for image, i in zip(as_tensor(self.images[which]), ids, strict=True)])

    def _draw(self, image: Tensor, i: int) -> Tensor:
        rng = np.random.default_rng([self.seed, self.view, i])
        size = image.shape[-1]
        top, left, height, width = random_crop_box(rng, size, self.smallest_area)
        crop = V.resized_crop(image, top, left, height, width, [size, size], antialias=True)
        return V.horizontal_flip(crop) if rng.random() < 0.5 else crop


def random_crop_box(rng: np.random.Generator, size: int, smallest_area: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) in a square: area uniform in [smallest_area, 1], aspect log-uniform in [3/4, 4/3]."""
    for _ in range(10):
        area = size * size * rng.uniform(smallest_area, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 1 <= height <= size and 1 <= width <= size:
            return int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1)), height, width
    return 0, 0, size, size
