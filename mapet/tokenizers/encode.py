"""Images to tokens: `tokenize` writes a token cache, `build_cache` one of tokens from anywhere.

A tokenizer is anything with the interface of `mapet.tokenizers.base.Tokenizer`: name, grid, vocabulary, input_size,
prepare, encode and fingerprint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapet import __version__
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter
from mapet.data.images import ImageSource
from mapet.data.jobs import Preparation, Prepared, Reading
from mapet.data.manifest import MANIFEST, CacheDescription, Skipped
from mapet.data.stages import TimeUse
from mapet.distributed import World
from mapet.errors import ConfigError
from mapet.tokenizers.usage import CodebookUsage, count_usage

SHOWN = 10


@dataclass(frozen=True)
class TokenizeReport:
    """Result of `tokenize` or `build_cache`.

    Attributes:
        output: the cache's folder.
        images: images in the cache.
        skipped: images left out, with the reason.
        time: of this run; nothing for a reused cache.
        usage: codebook usage of all tokens of the cache.
        reused: a complete cache of the same images, tokenizer and sizes was there already.
        shards: of the cache; `resumed` of them were finished by an earlier run.
    """

    output: Path
    images: int
    skipped: tuple[Skipped, ...]
    usage: CodebookUsage
    reused: bool
    time: TimeUse = field(default_factory=lambda: TimeUse(0.0, 0, {}, 0.0))
    shards: int = 0
    resumed: int = 0

    @property
    def images_per_second(self) -> float:
        return self.time.images_per_second

    def summary(self) -> str:
        """A few lines of text."""
        how = "reused as it is" if self.reused else f"{self.images_per_second:.1f} images/s"
        usage = self.usage
        lines = [f"{self.output}: {self.images} images, {how}"]
        if self.resumed:
            lines.append(
                f"{self.resumed} of {self.shards} shards were finished by an earlier run, and are as it left them"
            )
        if self.time.waited:
            lines.append(self.time.line())
        lines.append(
            f"codebook: {usage.vocabulary - len(usage.dead)} of {usage.vocabulary} entries used, "
            f"perplexity {usage.perplexity:.1f}"
        )
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} images (all are listed in the manifest):")
            lines.extend(f"  {item.reason}" for item in self.skipped[:SHOWN])
        return "\n".join(lines)


def tokenize(
    source: ImageSource,
    tokenizer,
    output: str | Path,
    *,
    image_size: int,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    shard_images: int = 0,
    world: World | None = None,
    **reading: Any,
) -> TokenizeReport:
    """Encode every image of a source and write the token cache; each image is decoded once.

    A call that was killed goes on from its finished shards when it is made again. Several processes share the shards;
    the cache is the same, byte for byte, as that of one process.

    Args:
        tokenizer: a fitted tokenizer; its batches are handed to it on `device`.
        image_size: side in pixels of the crops kept for pre-training; a multiple of `tokenizer.grid`.
        output, overwrite, shard_images, world, reading: as in `build_cache`, which says what is raised, too.
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
    provenance = {  # what may change tokens near the border of two entries, besides what the fingerprint covers
        "mapet": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "compiled": str(bool(getattr(tokenizer, "is_compiled", False))).lower(),
    }

    @torch.inference_mode()
    def encode(batch: Prepared) -> Tensor:
        return tokenizer.encode(batch.inputs.to(device, non_blocking=True)).cpu()

    preparation = Preparation(source, image_size, tokenizer.prepare, tokenizer.input_size)
    options = {"overwrite": overwrite, "shard_images": shard_images, "provenance": provenance, **reading}
    return build_cache(preparation, output, description, encode, world=world or World(device), **options)


def build_cache(
    preparation: Preparation,
    output: str | Path,
    description: CacheDescription,
    tokens_of: Callable[[Prepared], Tensor],
    *,
    overwrite: bool = False,
    shard_images: int = 0,
    world: World | None = None,
    provenance: Mapping[str, str] | None = None,
    **reading: Any,
) -> TokenizeReport:
    """Write the cache of a source, or go on with one that was begun, or reuse the one that is there.

    Args:
        preparation: what is made of the images of the source; its `image_size` is that of the description.
        output: folder of the cache. A complete cache of the same description is reused; one that differs is refused by
            name, or replaced if `overwrite`.
        tokens_of: gives the tokens (b, P) of a batch of decoded images.
        shard_images: images of a shard, the unit of resuming and of sharing; 0 for 1024 (for larger images, and for a
            quarter of a million of them and more, see `mapet.data.cache_writer.shard_size`).
        world: the processes that share the work (`mapet.distributed.connect`); this one alone where it is None.
        provenance: kept in the manifest.
        reading: fields of `mapet.data.jobs.Reading`: batch_size, workers, patience, max_skipped.
    Returns:
        The report, the same in every process.
    Raises:
        ConfigError: sizes that do not fit together, or numbers out of range.
        DataError: too many unreadable images, tokens of another shape or out of range, a stale cache or stale
            unfinished work, something else at `output`, disk full. Then, and on Ctrl-C, nothing is half-written, an
            earlier cache is untouched, and finished shards are kept to go on from.
    """
    if description.image_size % description.grid:
        raise ConfigError(
            f"image_size {description.image_size} is not divisible by the tokenizer's grid {description.grid}, "
            f"so a token would not stand for a whole patch"
        )
    if shard_images < 0:
        raise ConfigError(f"shard_images must not be negative, got {shard_images}")
    how, source, world = Reading(**reading), preparation.source, world or World(torch.device("cpu"))
    writer = CacheWriter(
        output,
        description,
        capacity=len(source),
        overwrite=overwrite,
        shard_images=shard_images,
        world=world,
        provenance={**(provenance or {}), "batch_size": str(how.batch_size)},
    )

    def complete(used: TimeUse, resumed: int) -> TokenizeReport:
        how.check_skipped(skipped := writer.skipped(), len(source))
        kept = writer.kept()
        labels = None if source.labels is None else source.labels[kept]
        writer.finish([source.names[position] for position in kept], labels, source.classes)
        usage = count_usage(TokenCache.open(output))
        return TokenizeReport(Path(output), len(kept), tuple(skipped), usage, False, used, writer.shards, resumed)

    if (report := world.on_main(lambda: _reused(writer, how, Path(output)))) is not None:
        return report
    with closing(writer):
        try:
            missing = writer.missing(world.on_main(writer.begin))
            used = writer.write(
                missing, preparation, lambda batch, _: [(batch.crops, tokens_of(batch))], how, "tokenising"
            )
            return world.on_main(lambda: complete(used, writer.shards - len(missing)))
        except KeyboardInterrupt:
            count = len(writer.parts())
            kept = f"the same command goes on from {count} of {writer.shards} shards"
            stopped = kept if count else "what was unfinished has been removed"
            raise KeyboardInterrupt(f"stopped by Ctrl-C; {stopped}") from None


def _reused(writer: CacheWriter, reading: Reading, output: Path) -> TokenizeReport | None:
    """The report of the cache that is at `output`; None where there is none, or it is to be replaced."""
    writer.sweep()
    if not os.path.exists(output / MANIFEST) or writer.overwrite:
        return None
    cache = TokenCache.open(output)
    cache.check_description(writer.description)
    reading.check_skipped(skipped := cache.manifest.skipped, writer.capacity)
    return TokenizeReport(output, len(cache), tuple(skipped), count_usage(cache), reused=True)
