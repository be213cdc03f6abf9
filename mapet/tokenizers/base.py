"""What every visual tokenizer is: prepare an image, encode images, say what decides the tokens, save and load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from mapet.errors import ConfigError, DataError

LARGEST_IMAGE = 16384
"""Side in pixels."""


@dataclass(frozen=True)
class Network:
    """The frozen network behind the tokens: `sha256` is of its weights, `source` where they came from."""

    architecture: str
    sha256: str
    source: str


class Tokenizer(ABC):
    """Maps the centre square of an image, cut into grid x grid patches, to one codebook id per patch.

    Args of every tokenizer:
        image_size, patch_size: of the images the model is trained on; they fix the grid.
        vocabulary: codebook entries, K, at most 65536.
        device: where it works.
    """

    name: ClassVar[str]
    has_network: ClassVar[bool] = False
    """Whether its constructor takes `precision` and `weights` of a network."""

    def __init__(self, image_size: int, patch_size: int, vocabulary: int, device: str | torch.device = "cpu") -> None:
        if image_size > LARGEST_IMAGE:
            raise ConfigError(f"image_size must be at most {LARGEST_IMAGE}, got {image_size}")
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ConfigError(f"image_size {image_size} is not divisible by patch_size {patch_size}")
        if not 2 <= vocabulary <= 65536:
            raise ConfigError(f"vocabulary must be in [2, 65536] (uint16 tokens), got {vocabulary}")
        self.image_size, self.patch_size, self.vocabulary = image_size, patch_size, vocabulary
        self.grid = image_size // patch_size
        self.device = torch.device(device)

    @property
    @abstractmethod
    def input_size(self) -> int:
        """Side in pixels of the images that `encode` takes."""

    @property
    def network(self) -> Network | None:
        """The network behind the tokens, where there is one."""
        return None

    @abstractmethod
    def prepare(self, image: Image.Image) -> Tensor:
        """The RGB image's centre square as uint8 (3, input_size, input_size)."""

    def settings(self) -> dict[str, Any]:
        """The arguments that make this tokenizer again, device and weights aside."""
        return {"image_size": self.image_size, "patch_size": self.patch_size, "vocabulary": self.vocabulary}

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, input_size, input_size) -> int64 (b, P), raster order, in [0, vocabulary).

        The tokens are made, and stay, on the tokenizer's device. DataError for images of another shape or dtype.
        """
        return self.tokens(self.checked(images))

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """As `encode`, of images that are checked and on the device."""

    def checked(self, images: Tensor) -> Tensor:
        """The images on the device. DataError where they are not of the shape and dtype that `encode` takes."""
        expected = (3, self.input_size, self.input_size)
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise DataError(
                f"tokenizer {self.name} takes uint8 images (b, {', '.join(map(str, expected))}), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        return images.to(self.device, non_blocking=True)

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, as hexadecimal text, of all that decides the tokens: settings, weights and codebook."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write all of it into a folder. DataError where it cannot be written."""

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu", **options: Any) -> Self:
        """The tokenizer saved in the folder; `options` go to the constructor. DataError names what is wrong there."""
