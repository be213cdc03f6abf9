"""The token cache: cropped uint8 images and uint16 tokens in memory-mapped .npy files, beside a manifest.

    manifest.json   what is in the folder and what it was made from (mapet/data/manifest.py)
    images_00000.npy, images_00001.npy, ...   uint8 (rows, 3, S, S)
    tokens.npy      uint16 (n, P), patches in raster order
    labels.npy      int64 (n,), where the source is labelled
    names.json      the images' names

`TokenCache.open` always checks the format, the presence and size of every file, dtypes, shapes and token range, and the
SHA-256 of everything but the image shards, which are nearly all of the bytes; `TokenCache.verify` checks those as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mapet.config import ModelConfig
from mapet.data.images import Images
from mapet.data.manifest import (
    LABELS,
    MANIFEST,
    NAMES,
    TOKENS,
    CacheDescription,
    Manifest,
    read_manifest,
    shard_name,
)
from mapet.errors import DataError
from mapet.files import FileRecord, UnreadableFile, map_array, read_json
from mapet.task import Batch

if TYPE_CHECKING:
    from mapet.data.loader import Share

ANEW = "make the cache anew"
ANOTHER = "tokenise into another folder, or replace this cache with --overwrite"

ROWS_BETWEEN_BEATS = 256


class TokenCache(Images):
    """A token cache, open for reading. Pickling it, as for a spawned worker, carries the path and maps the files anew.

    Attributes:
        path: its folder.
        manifest: its manifest.
        image_size, grid, vocabulary, tokenizer: as in CacheDescription; image_size is also called size.
        names: are read when first asked for.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        made = manifest.description
        self.size = self.image_size = made.image_size
        self.grid, self.vocabulary = made.grid, made.vocabulary
        self.tokenizer, self.classes = made.tokenizer, manifest.classes
        pixels = (3, self.image_size, self.image_size)
        self._shards = [
            map_array(path / shard_name(i), np.uint8, (rows, *pixels), advice=ANEW)
            for i, rows in enumerate(manifest.shards)
        ]
        self._starts = np.cumsum([0, *manifest.shards])[:-1]
        self._tokens = map_array(path / TOKENS, np.uint16, (len(self), self.grid**2), advice=ANEW)
        labels = map_array(path / LABELS, np.int64, (len(self),), advice=ANEW) if manifest.labelled else None
        self.labels = None if labels is None else np.array(labels)

    @classmethod
    def open(cls, path: str | Path) -> TokenCache:
        """Open a cache and check it, but for the pixels (see the top of the file).

        Raises:
            DataError: naming the file, what was found and what was expected.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name in manifest.file_names():
            _check(path / name, manifest.files[name])
        for name in manifest.file_names():
            if name in (TOKENS, LABELS, NAMES):
                _check(path / name, manifest.files[name], hashed=True)
        cache = cls(path, manifest)
        largest = int(cache._tokens.max(initial=0))
        if largest >= cache.vocabulary:
            raise DataError(f"{path / TOKENS} holds token {largest}, allowed are 0 to {cache.vocabulary - 1}")
        if cache.labels is not None:
            low, high, classes = cache.labels.min(), cache.labels.max(), cache.classes
            if low < 0 or (classes is not None and high >= len(classes)):
                allowed = "negative labels are not" if classes is None else f"0 to {len(classes) - 1} are"
                raise DataError(f"{path / LABELS} holds labels {low} to {high}, {allowed} allowed; {ANEW}")
        return cache

    def verify(self) -> None:
        """Hash every file, pixels too. DataError naming the first that differs from the manifest."""
        for name, record in self.manifest.files.items():
            _check(self.path / name, record, hashed=True)

    def __len__(self) -> int:
        return self.manifest.images

    def __reduce__(self):
        return type(self), (self.path, self.manifest)

    @cached_property
    def names(self) -> list[str]:
        names = read_json(self.path / NAMES, advice=ANEW)
        if not isinstance(names, list) or len(names) != len(self) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{self.path / NAMES} is not a list of {len(self)} names; {ANEW}")
        return names

    def images(self, ids: Tensor | np.ndarray | Sequence[int], beat: Callable[[], None] = lambda: None) -> Tensor:
        """Crops of the images `ids`: uint8 (b, 3, S, S). IndexError for an id outside [0, n).

        `beat` is called every ROWS_BETWEEN_BEATS images.
        """
        ids = self._checked(ids)
        images = np.empty((len(ids), 3, self.image_size, self.image_size), dtype=np.uint8)
        for first in range(0, len(ids), ROWS_BETWEEN_BEATS):
            some, into = ids[first : first + ROWS_BETWEEN_BEATS], images[first : first + ROWS_BETWEEN_BEATS]
            shards = np.searchsorted(self._starts, some, side="right") - 1
            for shard in np.unique(shards):
                here = np.flatnonzero(shards == shard)
                into[here] = self._shards[shard][some[here] - self._starts[shard]]
            beat()
        return torch.from_numpy(images)

    def read(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        return self.images(ids)

    @property
    def token_array(self) -> np.ndarray:
        """All tokens, uint16 (n, P), memory-mapped."""
        return self._tokens

    def tokens(self, ids: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """Tokens of the images `ids`: int64 (b, P), raster order. IndexError for an id outside [0, n)."""
        return torch.from_numpy(self._tokens[self._checked(ids)].astype(np.int64))

    def _checked(self, ids: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"image ids {ids.min()} to {ids.max()}, the cache {self.path} holds 0 to {len(self) - 1}")
        return ids

    @property
    def image_bytes(self) -> int:
        """Of one image in a batch, with its tokens."""
        return 3 * self.image_size**2 + 8 * (self.grid**2 + 1)

    def batch(self, ids: Tensor, share: Share, beat: Callable[[], None]) -> Batch:
        """images: uint8 (b, 3, S, S); tokens: int64 (b, P); ids: int64 (b,), positions in the cache."""
        return {"images": self.images(ids, beat), "tokens": self.tokens(ids), "ids": ids}

    def fingerprint(self) -> str:
        """SHA-256 over the hashes of the files: images, tokens, labels and names, in their order."""
        hashes = {name: record.sha256 for name, record in sorted(self.manifest.files.items())}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def check_model(self, model: ModelConfig) -> None:
        """DataError unless image size, grid and vocabulary are the model's."""
        patch = self.image_size // self.grid
        sizes = {"image_size": self.image_size, "patch_size": patch, "vocabulary": self.vocabulary}
        for name, size in sizes.items():
            if (other := getattr(model, name)) != size:
                raise DataError(
                    f"the cache {self.path} is for model.{name}={size}, the model has {other}: set that, or give a "
                    "cache for this model"
                )

    def check_description(self, wanted: CacheDescription) -> None:
        """DataError naming the first entry in which the cache differs from what is wanted."""
        found = self.manifest.description
        if found.source_fingerprint != wanted.source_fingerprint:
            raise DataError(f"{self.path} is of other images, or these have changed since: {ANOTHER}")
        for name, value in vars(wanted).items():
            self._expect(name, getattr(found, name), value)

    def _expect(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            raise DataError(f"{self.path / MANIFEST}: {what} is {found}, expected {expected}; {ANOTHER}")


def _check(path: Path, record: FileRecord, *, hashed: bool = False) -> None:
    """DataError unless a file has the size that its record says, and the SHA-256 if that is wanted."""
    try:
        found = FileRecord.of(path, record) if hashed else FileRecord(path.stat().st_size, record.sha256)
    except (OSError, UnreadableFile) as error:
        reason = error.reason if isinstance(error, UnreadableFile) else error.strerror
        raise DataError(f"{path} of the token cache cannot be read: {reason}; {ANEW}") from error
    if found.bytes != record.bytes:
        raise DataError(f"{path} has {found.bytes} bytes, expected {record.bytes}; copy it again or {ANEW}")
    if found != record:
        raise DataError(f"{path} is damaged: SHA-256 {found.sha256}, expected {record.sha256}; copy it again or {ANEW}")
