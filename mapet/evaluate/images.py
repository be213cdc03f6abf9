"""What evaluation reads images from: `mapet.data.images.Images`, tensors, and random views of either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from mapet.data import images as data
from mapet.data.views import drawing_from
from mapet.rng import step_generator

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
