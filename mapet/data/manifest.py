"""manifest.json of a token cache: what is in the folder, what it was made from, and the hash of every file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapet.data.npyfile import FileRecord
from mapet.errors import DataError

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

    image_size: int
    grid: int
    vocabulary: int
    tokenizer: str
    tokenizer_fingerprint: str
    source_fingerprint: str
    crop: str = CROP

    def __post_init__(self) -> None:
        for name in ("image_size", "grid", "vocabulary"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise DataError(f"a cache's {name} is a positive integer, got {value!r}")
        if self.vocabulary > 65536:
            raise DataError(f"a cache stores uint16 tokens, so its vocabulary is at most 65536, got {self.vocabulary}")


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
    images: int
    shards: list[int]
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
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no token cache: it has no {MANIFEST}; make one with `mapet tokenize`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}; make the cache anew") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r}, this version of mapet reads {FORMAT}; make the cache anew")
    try:
        manifest = _from_values(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}; make the cache anew") from error
    if sum(manifest.shards) != manifest.images:
        raise DataError(f"{path}: its shards hold {sum(manifest.shards)} images, its count is {manifest.images}")
    if set(manifest.files) != set(manifest.file_names()):
        raise DataError(f"{path} lists files {sorted(manifest.files)}, expected {sorted(manifest.file_names())}")
    return manifest


def _from_values(values: dict[str, Any]) -> Manifest:
    typed = {
        "description": CacheDescription(**values["description"]),
        "images": int(values["images"]),
        "shards": [int(rows) for rows in values["shards"]],
        "skipped": [Skipped(**item) for item in values["skipped"]],
        "files": {name: FileRecord(**record) for name, record in values["files"].items()},
    }
    return Manifest(**{**values, **typed})
