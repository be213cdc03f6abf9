"""Some of the images of a source, as a source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mapet.data.images import ImageSource, fingerprint_of


class Subset(ImageSource):
    """The images `ids` of another source, in that order, with their names and labels; the classes stay as they are.

    Raises:
        IndexError: an id outside the source.
    """

    def __init__(self, source: ImageSource, ids: Sequence[int] | np.ndarray) -> None:
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(source):
            raise IndexError(f"image ids {ids.min()} to {ids.max()}, the source holds 0 to {len(source) - 1}")
        self.source, self.ids = source, ids
        self.names = [source.names[i] for i in ids]
        self.labels = None if source.labels is None else source.labels[ids]
        self.classes = source.classes

    def load(self, index: int) -> Image.Image:
        return self.source.load(int(self.ids[index]))

    def fingerprint(self) -> str:
        return fingerprint_of([self.source.fingerprint(), *map(str, self.ids)])
