"""Small stand-ins for the data tests: a tokenizer, a source in memory, and a cache of both."""

import errno
import hashlib
import os
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from mapet.data import cache_writer
from mapet.data.cache import TokenCache
from mapet.data.decode import centre_square
from mapet.data.images import ImageSource
from mapet.data.manifest import CacheDescription
from mapet.errors import DataError


class BrightnessTokenizer:
    """Token of a patch: its mean brightness, in `vocabulary` steps."""

    name = "brightness"

    def __init__(self, input_size=16, grid=4, vocabulary=32):
        self.input_size, self.grid, self.vocabulary = input_size, grid, vocabulary

    def prepare(self, image):
        return torch.from_numpy(centre_square(image, self.input_size))

    def encode(self, images):
        patch = self.input_size // self.grid
        means = torch.nn.functional.avg_pool2d(images.float().mean(1, keepdim=True), patch)
        return (means.flatten(1) / 256 * self.vocabulary).long()

    def fingerprint(self):
        return hashlib.sha256(f"{self.input_size} {self.grid} {self.vocabulary}".encode()).hexdigest()


class NoiseSource(ImageSource):
    """`length` random 20x16 images; those whose positions are in `bad` cannot be read."""

    def __init__(self, length=10, bad=(), labelled=True):
        self.names = [f"noise_{i}" for i in range(length)]
        self.bad = set(bad)
        self.classes = ["even", "odd"] if labelled else None
        self.labels = np.arange(length) % 2 if labelled else None

    def load(self, index):
        if index in self.bad:
            raise DataError(f"cannot read image {self.names[index]}: broken")
        pixels = np.random.default_rng(index).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def fingerprint(self):
        return hashlib.sha256(repr(self.names).encode()).hexdigest()


def fit_on(tokenizer, images, **settings):
    """Fit a tokenizer over all patches of prepared images, in memory; the report."""
    rows = tokenizer.features(images).flatten(0, 1)
    return tokenizer.fit(rows, images=len(images), patches=len(rows), **settings)


def description(**changes):
    values = {
        "image_size": 8,
        "grid": 2,
        "vocabulary": 32,
        "tokenizer": "brightness",
        "tokenizer_fingerprint": "t",
        "source_fingerprint": "s",
    }
    return CacheDescription(**{**values, **changes})


def random_rows(length, *, image_size=8, patches=4, vocabulary=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (length, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, vocabulary, (length, patches), generator=generator)


def write_cache(path, length=10, *, rows_per_shard=4, labelled=True, overwrite=False, seed=0):
    """A cache of random rows; returns it with the rows."""
    images, tokens = random_rows(length, seed=seed)
    labels, classes = (np.arange(length) % 2, ["even", "odd"]) if labelled else (None, None)
    names = [f"im/{i}.png" for i in range(length)]
    sizes = {"overwrite": overwrite, "shard_images": rows_per_shard}
    cache_writer.write_cache(path, description(), images, tokens, names, labels, classes, **sizes)
    return TokenCache.open(path), images, tokens


def entries(folder):
    """All files below a folder with their bytes, to show that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Trap:
    """A pickle of this makes a file when it is loaded as pickles are."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def flip(path, at=-1):
    """Change a bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def no_space(*_, **__):
    """In place of something that writes: the disk is full."""
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def without_root():
    """Root may read every file; be nobody for a moment."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
