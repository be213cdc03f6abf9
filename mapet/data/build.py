"""Making a token cache from a source: the part that tokenising and importing have in common."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mapet.codebook import CodebookUsage
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter
from mapet.data.images import ImageSource
from mapet.data.manifest import MANIFEST, CacheDescription
from mapet.data.prepare import Prepared, SkipLog, in_batches, prepared_batches
from mapet.data.progress import progress
from mapet.data.report import TokenizeReport
from mapet.errors import ConfigError


def build_cache(
    source: ImageSource,
    output: str | Path,
    description: CacheDescription,
    tokens_of: Callable[[Prepared], Tensor],
    *,
    prepare: Callable[[Image.Image], Tensor] | None = None,
    batch_size: int = 64,
    workers: int = 2,
    max_skipped: float = 0.01,
    overwrite: bool = False,
) -> TokenizeReport:
    """Write the cache of a source, or reuse the one that is there.

    Args:
        description: what the cache will hold.
        tokens_of: gives the tokens (b, P) of a batch of decoded images.
        prepare: `Tokenizer.prepare`, where `tokens_of` needs `Prepared.inputs`.
        max_skipped: largest fraction of unreadable images.
        overwrite: replace a cache at `output`, even one that matches.
    Raises:
        DataError: too many unreadable images, another cache or something else at `output`, disk full; nothing is
            half-written.
    """
    if description.image_size % description.grid:
        raise ConfigError(
            f"image_size {description.image_size} is not divisible by the tokenizer's grid {description.grid}, "
            f"so a token would not stand for a whole patch"
        )
    if workers < 0:
        raise ConfigError(f"workers must not be negative, got {workers}")
    log = SkipLog(len(source), max_skipped)
    if os.path.exists(Path(output) / MANIFEST) and not overwrite:
        return _reused(Path(output), description, log)
    batches = prepared_batches(
        source,
        in_batches(range(len(source)), batch_size),
        image_size=description.image_size,
        prepare=prepare,
        workers=workers,
    )
    start = time.monotonic()
    with CacheWriter(output, description, capacity=len(source), overwrite=overwrite) as writer:
        kept, counts = _fill(writer, batches, tokens_of, log)
        seconds = time.monotonic() - start
        writer.finish(
            names=[source.names[index] for index in kept],
            labels=None if source.labels is None else source.labels[kept],
            classes=source.classes,
            skipped=log.skipped,
        )
    return TokenizeReport(
        Path(output), len(kept), tuple(log.skipped), seconds, CodebookUsage(counts.numpy()), reused=False
    )


def _fill(
    writer: CacheWriter, batches: Iterable[Prepared], tokens_of: Callable[[Prepared], Tensor], log: SkipLog
) -> tuple[list[int], Tensor]:
    """Append all batches. Returns the positions of the images kept, and the tokens' counts per codebook entry."""
    kept: list[int] = []
    counts = torch.zeros(writer.description.vocabulary, dtype=torch.int64)
    prepared = iter(batches)  # forks the workers before the progress bar starts its thread
    with progress(log.total, "tokenising") as advance:
        for batch in prepared:
            log.add(batch.skipped)
            if batch.ids:
                tokens = tokens_of(batch).cpu()
                writer.append(batch.crops, tokens)
                counts += torch.bincount(tokens.flatten().long(), minlength=len(counts))
                kept.extend(batch.ids)
            advance(len(batch.ids) + len(batch.skipped))
    return kept, counts


def _reused(output: Path, description: CacheDescription, log: SkipLog) -> TokenizeReport:
    cache = TokenCache.open(output)
    cache.check_description(description)
    log.add(cache.manifest.skipped)
    counts = torch.zeros(cache.vocabulary, dtype=torch.int64)
    for batch in in_batches(range(len(cache)), 65536):
        counts += torch.bincount(cache.tokens(batch).flatten(), minlength=len(counts))
    return TokenizeReport(output, len(cache), tuple(log.skipped), 0.0, CodebookUsage(counts.numpy()), reused=True)
