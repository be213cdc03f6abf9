"""manifest.json of a token cache: what is in the folder, what it was made from, and the hash of every file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mapet.checked import at_least, check_fields
from mapet.errors import DataError
from mapet.files import FileRecord, UnreadableFile, read_record

FORMAT = 1
CROP = "centre square, bicubic"
MANIFEST, TOKENS, LABELS, NAMES = "manifest.json", "tokens.npy", "labels.npy", "names.json"


@dataclass(frozen=True)
class CacheDescription:
    """What a cache is made from and for: known before the first image is read.

    Attributes:
        image_size: side of the stored crops in pixels.
        grid: tokens along one side of an image.
        vocabulary: tokens are in [0, vocabulary).
        tokenizer, tokenizer_fingerprint: name, and hash of the weights and codebook.
        source_fingerprint: `ImageSource.fingerprint()`, the hash of the image list.
        crop: how the crop was taken.
    """

    image_size: Annotated[int, at_least(1, 16384)]
    grid: Annotated[int, at_least(1, 16384)]
    vocabulary: Annotated[int, at_least(1, 65536)]
    tokenizer: str
    tokenizer_fingerprint: str
    source_fingerprint: str
    crop: str = CROP

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except ValueError as error:
            raise DataError(f"a cache's {error}") from error


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read."""

    name: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json.

    Attributes:
        shards: images in each shard, maybe none.
        files: one record per file but the manifest.
        provenance: versions, device and settings that the tokens were computed with, one entry for each that occurred.
    """

    description: CacheDescription
    images: Annotated[int, at_least(1)]
    shards: list[Annotated[int, at_least(0)]]
    classes: list[str] | None
    labelled: bool
    skipped: list[Skipped]
    files: dict[str, FileRecord]
    provenance: list[dict[str, str]] = field(default_factory=list)
    format: int = field(default=FORMAT)

    def file_names(self) -> list[str]:
        """The files that the folder must hold beside the manifest; never taken from the manifest's own keys."""
        small = [TOKENS, NAMES, *([LABELS] if self.labelled else [])]
        return [*small, *(shard_name(i) for i in range(len(self.shards)))]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def shard_name(index: int) -> str:
    """File name of an image shard."""
    return f"images_{index:05d}.npy"


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json. DataError: no cache here, of another format version, or damaged."""
    path = folder / MANIFEST
    try:
        manifest = read_record(path, Manifest, version=FORMAT, advice="make the cache anew")
    except UnreadableFile as error:
        if not error.missing:
            raise
        raise DataError(f"{folder} is no token cache: it has no {MANIFEST}; make one with `mapet tokenize`") from error
    if sum(manifest.shards) != manifest.images:
        raise DataError(f"{path}: its shards hold {sum(manifest.shards)} images, its count is {manifest.images}")
    if set(manifest.files) != set(manifest.file_names()):
        raise DataError(f"{path} lists files {sorted(manifest.files)}, expected {sorted(manifest.file_names())}")
    return manifest
