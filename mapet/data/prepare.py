"""Decoding images in worker processes: each image once, cropped for the cache and prepared for the tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from mapet.data.feed import PATIENCE, Feed
from mapet.data.images import ImageSource, centre_square
from mapet.data.manifest import Skipped
from mapet.errors import ConfigError, DataError

SHOWN = 5


@dataclass(frozen=True)
class Prepared:
    """One batch of decoded images.

    Attributes:
        ids: positions in the source of the images that could be read, (b).
        crops: uint8 (b, 3, S, S) centre squares; None where none were asked for, or no image could be read.
        inputs: uint8 (b, 3, s, s) for the tokenizer; None likewise.
        skipped: the images that could not be read.
    """

    ids: list[int]
    crops: Tensor | None
    inputs: Tensor | None
    skipped: list[Skipped]

    def pin_memory(self) -> Prepared:
        """With the inputs in page-locked memory, from which a GPU copies without waiting; the DataLoader calls this."""
        return self if self.inputs is None else replace(self, inputs=self.inputs.pin_memory())


@dataclass(frozen=True)
class _Preparer:
    """A batch of positions to a Prepared."""

    source: ImageSource
    image_size: int | None
    prepare: Callable[[Image.Image], Tensor] | None

    def __call__(self, batch: Sequence[int], beat: Callable[[], None]) -> Prepared:
        ids, crops, inputs, skipped = [], [], [], []
        for index in batch:
            beat()
            try:
                image = self.source.load(index)
            except DataError as error:
                skipped.append(Skipped(self.source.names[index], str(error)))
                continue
            ids.append(index)
            if self.image_size is not None:
                crops.append(torch.from_numpy(centre_square(image, self.image_size)))
            if self.prepare is not None:
                inputs.append(self.prepare(image))
        return Prepared(ids, _stack(crops), _stack(inputs), skipped)


def _stack(images: list[Tensor]) -> Tensor | None:
    return torch.stack(images) if images else None


def prepared_batches(
    source: ImageSource,
    batches: Sequence[Sequence[int]],
    *,
    image_size: int | None = None,
    prepare: Callable[[Image.Image], Tensor] | None = None,
    input_size: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    patience: float = PATIENCE,
) -> Feed[Prepared]:
    """Decode batches of positions of the source, in order. A context manager, which ends the workers; see Feed.

    Args:
        image_size: side of the centre-square crops; None for no crops.
        prepare: `Tokenizer.prepare`; None for no tokenizer inputs.
        input_size: side of what it makes.
        workers: processes; 0 decodes in this one.
        pin_memory: put tokenizer inputs into page-locked memory, for a GPU.
        patience: seconds that a worker may take for one image.
    """
    pixels = 3 * ((image_size or 0) ** 2 + (input_size**2 if prepare else 0))
    return Feed(
        _Preparer(source, image_size, prepare),
        batches,
        workers=workers,
        batch_bytes=max(map(len, batches), default=0) * pixels,
        patience=patience,
        pin_memory=pin_memory,
        # A forked worker shares the tokenizer's weights with its parent; a spawned one would be sent a copy of them.
        fork=sys.platform == "linux",
        prefix="--",
    )


def in_batches(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Positions cut into batches, the last one maybe shorter. ConfigError for a batch size below 1."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


@dataclass
class SkipLog:
    """The images skipped so far, against the limit of `max_skipped` of `total` images.

    Raises:
        ConfigError: max_skipped is not in [0, 1].
    """

    total: int
    max_skipped: float
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"max_skipped is a fraction in [0, 1], got {self.max_skipped}")

    def replace(self, skipped: Sequence[Skipped]) -> None:
        """Begin again with these images; raises as `add` does."""
        self.skipped.clear()
        self.add(skipped)

    def add(self, skipped: Sequence[Skipped]) -> None:
        """Note skipped images. DataError naming the first ones when there are more than the limit allows."""
        self.skipped.extend(skipped)
        allowed = int(self.max_skipped * self.total)
        if len(self.skipped) > allowed:
            reasons = "; ".join(item.reason for item in self.skipped[:SHOWN])
            raise DataError(
                f"{len(self.skipped)} unreadable images, but max_skipped {self.max_skipped:g} of {self.total} allows "
                f"{allowed}: {reasons}; remove or repair them, or raise max_skipped"
            )
