"""Images to tokens: `tokenize` writes a token cache, `fit_batches` feeds `Tokenizer.fit`.

A tokenizer is anything with the interface of `mapet.tokenizers.base.Tokenizer`: name, grid, vocabulary, input_size,
prepare, encode and fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mapet import __version__
from mapet.data.build import build_cache
from mapet.data.feed import PATIENCE
from mapet.data.images import ImageSource
from mapet.data.manifest import CacheDescription, Skipped
from mapet.data.prepare import Prepared, SkipLog, in_batches, prepared_batches
from mapet.data.report import TokenizeReport
from mapet.distributed import World
from mapet.errors import ConfigError


def tokenize(
    source: ImageSource,
    tokenizer,
    output: str | Path,
    *,
    image_size: int,
    batch_size: int = 64,
    workers: int = 2,
    patience: float = PATIENCE,
    device: str | torch.device = "cpu",
    max_skipped: float = 0.01,
    overwrite: bool = False,
    shard_images: int = 0,
    world: World | None = None,
) -> TokenizeReport:
    """Encode every image of a source and write the token cache; each image is decoded once.

    A call that was killed goes on from its finished shards when it is made again. Several processes share the shards;
    the cache is the same, byte for byte, as that of one process.

    Args:
        source: the images.
        tokenizer: a fitted tokenizer; its batches are handed to it on `device`.
        output: folder of the cache. A complete cache of the same images, tokenizer and sizes is reused; one that
            differs is refused by name, or replaced if `overwrite`.
        image_size: side in pixels of the crops kept for pre-training; a multiple of `tokenizer.grid`.
        workers: processes that decode, for each process of the world; `patience` seconds are the most for one image.
        max_skipped: unreadable images are skipped and listed, up to this fraction of all.
        shard_images: images of a shard, the unit of resuming and of sharing; 0 for 1024 (for larger images, and for a
            quarter of a million of them and more, see `mapet.data.cache_writer.shard_size`).
        world: the processes that share the work (`mapet.distributed.connect`); this one alone where it is None.
    Raises:
        ConfigError: sizes that do not fit together.
        DataError: too many unreadable images, tokens of another shape or out of range, a stale cache or stale
            unfinished work, disk full. Then, and on Ctrl-C, nothing is half-written, an earlier cache is untouched, and
            finished shards are kept to go on from.
    """
    device = torch.device(device)
    description = CacheDescription(
        image_size=image_size,
        grid=tokenizer.grid,
        vocabulary=tokenizer.vocabulary,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        source_fingerprint=source.fingerprint(),
    )

    @torch.inference_mode()
    def encode(batch: Prepared) -> Tensor:
        return tokenizer.encode(batch.inputs.to(device, non_blocking=True))

    return build_cache(
        source,
        output,
        description,
        encode,
        prepare=tokenizer.prepare,
        input_size=tokenizer.input_size,
        batch_size=batch_size,
        workers=workers,
        patience=patience,
        max_skipped=max_skipped,
        overwrite=overwrite,
        shard_images=shard_images,
        world=world or World(device),
        provenance=provenance_of(tokenizer, device),
    )


def provenance_of(tokenizer, device: torch.device) -> dict[str, str]:
    """What may change tokens near the border of two entries, besides what the tokenizer's fingerprint covers."""
    return {
        "mapet": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "compiled": str(bool(getattr(tokenizer, "is_compiled", False))).lower(),
    }


class FitBatches:
    """Tokenizer inputs of a source in a random order, the same each time it is iterated; made by `fit_batches`.

    Attributes:
        skipped: the unreadable images of the last iteration.
    """

    def __init__(
        self,
        source: ImageSource,
        tokenizer,
        order: list[int],
        batch_size: int,
        workers: int,
        patience: float,
        max_skipped: float,
    ) -> None:
        self.source, self.tokenizer, self.workers, self.max_skipped = source, tokenizer, workers, max_skipped
        self.patience = patience
        self.images, self.order = len(order), order
        self.batches = in_batches(order, batch_size)
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        return len(self.batches)

    def fingerprint(self) -> str:
        """SHA-256, as hexadecimal text, of the images and their order."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self.order}".encode()).hexdigest()

    def __iter__(self) -> Iterator[Tensor]:
        log = SkipLog(self.images, self.max_skipped)
        self.skipped = log.skipped
        with prepared_batches(
            self.source,
            self.batches,
            prepare=self.tokenizer.prepare,
            input_size=self.tokenizer.input_size,
            workers=self.workers,
            patience=self.patience,
        ) as prepared:
            for batch in prepared:
                log.add(batch.skipped)
                if batch.inputs is not None:
                    yield batch.inputs


def fit_batches(
    source: ImageSource,
    tokenizer,
    *,
    batch_size: int = 64,
    workers: int = 2,
    patience: float = PATIENCE,
    seed: int = 0,
    limit: int = 0,
    max_skipped: float = 0.01,
) -> FitBatches:
    """Batches for `Tokenizer.fit`: uint8 (b, 3, s, s), s = tokenizer.input_size, images in an order drawn from `seed`.

    Args:
        limit: use so many images at most, drawn at random; 0 for all.
        max_skipped: unreadable images are left out up to this fraction, then iterating raises DataError.
    """
    if limit < 0:
        raise ConfigError(f"limit must not be negative, got {limit}")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    return FitBatches(source, tokenizer, order[: limit or None], batch_size, workers, patience, max_skipped)
