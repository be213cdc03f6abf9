"""What evaluation reads images from: anything with a length whose slices are uint8 images (b, 3, S, S)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from mapet.data.cache import TokenCache
from mapet.data.images import ImageSource, centre_square
from mapet.data.views import drawing_from
from mapet.errors import DataError
from mapet.rng import step_generator


class Images(Protocol):
    """A uint8 tensor or array (n, 3, S, S), or a class that loads a slice of one on request."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: slice) -> Tensor | np.ndarray: ...


def as_tensor(images: Tensor | np.ndarray) -> Tensor:
    """A slice of `Images` as a uint8 tensor. Raises TypeError or ValueError when it is not uint8 (b, 3, S, S)."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must have shape (n, 3, size, size), got {tuple(images.shape)}")
    return images


@dataclass(frozen=True)
class SourceImages:
    """The centre squares of an image source, `size` pixels wide, loaded as they are needed."""

    source: ImageSource
    size: int
    ids: np.ndarray
    """Which images of the source, in this order."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice) -> np.ndarray:
        try:
            return np.stack([centre_square(self.source.load(int(i)), self.size) for i in self.ids[which]])
        except DataError as error:
            raise DataError(f"{error}; take it away, or give a token cache of these images, made without it") from error


@dataclass(frozen=True)
class CacheImages:
    """Some of the images of a token cache, as they were cropped for pre-training."""

    cache: TokenCache
    ids: np.ndarray
    """Which images of the cache, in this order."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice) -> Tensor:
        return self.cache.images(self.ids[which])


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
        size = image.shape[-1]
        draw = v2.Compose([v2.RandomResizedCrop(size, (self.smallest_area, 1.0)), v2.RandomHorizontalFlip()])
        with drawing_from(step_generator(self.seed, i, f"view {self.view}")):
            return draw(image)
