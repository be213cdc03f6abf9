"""Tokens from pixels: k-means over the flattened RGB values of patches. Needs no weights."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from mapet.data.decode import centre_square
from mapet.tokenizers.kmeans import KMeansTokenizer


class PixelTokenizer(KMeansTokenizer):
    """A patch is its 3 p^2 values in [0, 1], channel by channel, and its token the nearest mean patch."""

    name = "pixel"

    @property
    def input_size(self) -> int:
        return self.image_size

    @property
    def feature_size(self) -> int:
        return 3 * self.patch_size**2

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(centre_square(image, self.input_size))

    def features(self, images: Tensor) -> Tensor:
        grid, patch = self.grid, self.patch_size
        # (b, 3, rows, y, columns, x) -> (b, rows, columns, 3, y, x)
        patches = images.view(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(len(images), grid**2, self.feature_size).float() / 255
