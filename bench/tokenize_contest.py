"""Tokenising JPEG files as a contest: the pipeline with workers, beside the same pipeline in one process.

`python -m bench tokenize` tells the stages apart. The tokens of each way are checked against the tokenizer called
directly on the crops, which no pipeline stands between.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.contest import Arena, Contest, Entrant
from bench.options import Options
from bench.timing import Clock
from bench.tokenize_suite import SMALL, TokenizeBenchmark, random_kclip, rows_of, write_images
from mapet.data.cache import TokenCache
from mapet.data.images import ImageSource
from mapet.data.sources import open_source
from mapet.tokenizers import KClipTokenizer
from mapet.tokenizers.encode import tokenize
from mapet.tokenizers.foreign.clip_trunk import TrunkConfig

DIFFERENT = 0.01
"""Share of tokens that may differ: a network may round otherwise in another process, and some entries lie near ties."""


def contests(chosen: Options, device: torch.device) -> list[Contest]:
    """One, at the sizes of `python -m bench tokenize`: RN50x64 on a GPU, an eighth of its width on a CPU."""
    on_gpu = device.type == "cuda"
    images, workers = chosen.images or (2048 if on_gpu else 64), max(1, chosen.workers)
    precision = chosen.dtype[0] if on_gpu else "fp32"
    made = TokenizeBenchmark(
        str(device), images, workers=workers, precision=precision, grid=14 if on_gpu else 4,
        vocabulary=8192 if on_gpu else 256,
    )  # fmt: skip
    return [contest(made)]


def contest(made: TokenizeBenchmark) -> Contest:
    """Files to cache, with `made.workers` processes that decode and with none."""
    ways = (f"workers_{made.workers}", "workers_0")
    sizes = {"images": made.images, "batch": made.batch, "grid": made.grid, "vocabulary": made.vocabulary}
    name = f"kclip {made.precision} {made.images} images of {made.width} x {made.height}"
    return Contest("tokenize", name, sizes, ("files_to_cache",), ways, ways[0], made.precision, partial(arena, made))


@contextmanager
def arena(made: TokenizeBenchmark) -> Iterator[Arena]:
    """The files, the tokenizer with random weights, and the tokens it gives the crops."""
    trunk = TrunkConfig() if made.device != "cpu" else SMALL
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_images(place / "images", made.images, made)
        source = open_source(place / "images")
        tokenizer = random_kclip(place / "weights.safetensors", trunk, made.grid, made.vocabulary, made)
        tokenizer.set_codebook(rows_of(source, tokenizer, made.vocabulary), "patches")

        def run(workers: int) -> Path:
            out = place / f"cache_{workers}"
            shutil.rmtree(out, ignore_errors=True)
            tokenize(
                source, tokenizer, out, device=made.device, image_size=16 * made.grid, batch_size=made.batch,
                workers=workers,
            )  # fmt: skip
            return out

        def entrant(workers: int) -> Entrant:
            def sample(clock: Clock) -> dict[str, float]:
                return {"files_to_cache": clock.time(lambda: run(workers))[1]}

            return Entrant(sample, lambda: TokenCache.open(run(workers)))

        ways = {f"workers_{count}": partial(entrant, count) for count in (made.workers, 0)}
        yield Arena(ways, partial(judge, direct_tokens(source, tokenizer, made)), images=made.images)


def direct_tokens(source: ImageSource, tokenizer: KClipTokenizer, made: TokenizeBenchmark) -> Tensor:
    """Tokens (b, P) of the first batch of images, without a pipeline."""
    crops = torch.stack([tokenizer.prepare(source.load(i)) for i in range(min(made.batch, made.images))])
    with torch.inference_mode():
        return tokenizer.encode(crops.to(tokenizer.device)).cpu()


def judge(expected: Tensor, cache: TokenCache) -> dict[str, float]:
    """Share of the first batch's tokens that differ, in units of what is allowed."""
    tokens = cache.tokens(torch.arange(len(expected)))
    return {"tokens": (tokens != expected).double().mean().item() / DIFFERENT}
