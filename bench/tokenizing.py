"""Tokenising JPEG files by k-CLIP with random weights: the pipeline with workers, beside it in one process.

The tokens of each way are checked against the tokenizer called directly on the crops, which no pipeline stands between.
RN50x64 at 448 pixels and 8192 entries on a GPU, an eighth of its width at 128 pixels and 256 entries on a CPU. The
weights are random, so the tokens mean nothing; the codebook is features of the images, so that the exact assignment has
as few near ties as a fitted one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bench.contest import Arena, Contest, Entrant, Timed
from bench.options import Options
from mapet.data.cache import TokenCache
from mapet.data.sources import open_source
from mapet.tokenizers import make_tokenizer
from mapet.tokenizers.encode import tokenize
from mapet.tokenizers.foreign.clip_trunk import TrunkConfig, build_trunk
from mapet.tokenizers.kclip import KClipTokenizer

SMALL = TrunkConfig(width=16, layers=(1, 1, 1, 1))
DIFFERENT = 0.01
"""Share of tokens that may differ: a network may round otherwise in another process, and some entries lie near ties."""
WIDTH, HEIGHT, QUALITY = 500, 375, 90
"""Of the JPEG files: ImageNet's average."""
BATCH = 64


def contests(chosen: Options, device: torch.device) -> list[Contest]:
    """One: files to cache, with processes that decode and with none."""
    on_gpu = device.type == "cuda"
    images, workers = chosen.images or (2048 if on_gpu else 64), max(1, chosen.workers)
    precision, grid, vocabulary = (chosen.dtype[0], 14, 8192) if on_gpu else ("fp32", 4, 256)
    ways = {f"workers_{workers}": workers, "workers_0": 0}
    sizes = {"images": images, "batch": BATCH, "grid": grid, "vocabulary": vocabulary}
    name = f"kclip {precision} {images} images of {WIDTH} x {HEIGHT}"
    return [
        Contest(
            "tokenize", name, sizes, ("files_to_cache",), tuple(ways), next(iter(ways)), precision,
            partial(arena, ways, images, grid, vocabulary, precision, device),
        )
    ]  # fmt: skip


@contextmanager
def arena(
    ways: dict[str, int], images: int, grid: int, vocabulary: int, precision: str, device: torch.device
) -> Iterator[Arena]:
    """The files, the tokenizer with random weights, and the tokens it gives the crops."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_images(place / "images", images)
        source = open_source(place / "images")
        tokenizer = random_kclip(place / "weights.safetensors", grid, vocabulary, precision, device)
        crops = torch.stack([tokenizer.prepare(source.load(i)) for i in range(min(BATCH, images))])
        tokenizer.set_codebook(different_features(tokenizer, crops, vocabulary), "patches")
        with torch.inference_mode():
            expected = tokenizer.encode(crops.to(device)).cpu()

        def run(workers: int) -> tuple[Path, Any]:
            out = place / f"cache_{workers}"
            shutil.rmtree(out, ignore_errors=True)
            report = tokenize(
                source, tokenizer, out, device=str(device), image_size=16 * grid, batch_size=BATCH, workers=workers
            )
            return out, report.time

        def entrant(workers: int) -> Entrant:
            def facts() -> dict[str, Any]:
                _, used = run(workers)
                shares = {stage: round(share, 4) for stage, share in used.shares().items()}
                return {"shares": shares, "bottleneck": used.bottleneck}

            return Entrant({"files_to_cache": Timed(partial(run, workers))}, lambda: run(workers)[0], facts=facts)

        def judge(cache: Path) -> dict[str, float]:
            tokens = TokenCache.open(cache).tokens(torch.arange(len(expected)))
            return {"tokens": (tokens != expected).double().mean().item() / DIFFERENT}

        yield Arena({name: partial(entrant, workers) for name, workers in ways.items()}, judge, images=images)


def write_images(folder: Path, count: int) -> None:
    """JPEG files of coarse shapes under fine noise, whose size is that of photographs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        shapes = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = (shapes + rng.normal(0, 12, shapes.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=QUALITY)


def random_kclip(path: Path, grid: int, vocabulary: int, precision: str, device: torch.device) -> KClipTokenizer:
    """The tokenizer with random weights, which pass through a file as real ones do."""
    torch.manual_seed(0)
    state = build_trunk(TrunkConfig() if device.type == "cuda" else SMALL).state_dict()
    for name, values in state.items():
        if name.endswith("bn.weight"):  # the last of a block would be 0, and the block nothing
            values.fill_(0.5)
    save_file(state, path)
    same = {"image_size": 16 * grid, "vocabulary": vocabulary, "device": str(device), "precision": precision}
    return make_tokenizer("kclip", weights=path, **same)


def different_features(tokenizer: KClipTokenizer, crops: Tensor, count: int) -> Tensor:
    """So many different features of the crops, drawn at random; ValueError where there are too few."""
    parts = [tokenizer.features(part.to(tokenizer.device)).flatten(0, 1).float().cpu() for part in crops.split(16)]
    rows = torch.unique(torch.cat(parts), dim=0)
    if len(rows) < count:
        raise ValueError(f"{len(crops)} images have {len(rows)} different features, the codebook needs {count}")
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]
