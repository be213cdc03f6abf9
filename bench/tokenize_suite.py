"""Throughput of the k-CLIP pipeline with random weights, from JPEG files to the token cache, split by stage."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.records import RESULTS, device_state
from mapet.data.images import Subset
from mapet.data.sources import open_source
from mapet.tokenizers import KClipTokenizer, make_tokenizer
from mapet.tokenizers.encode import tokenize
from mapet.tokenizers.foreign.clip_trunk import TrunkConfig, build_trunk

SMALL = TrunkConfig(width=16, layers=(1, 1, 1, 1))


@dataclass(frozen=True)
class TokenizeBenchmark:
    """Files to tokens by k-CLIP with random weights, by stage.

    0 and None are 2048 images, RN50x64 at 448 pixels and 8192 entries on a GPU, and 96 images, a trunk of an eighth of
    the width at 128 pixels and 256 entries on a CPU.
    """

    device: str = "cpu"
    images: int = 0
    """Images to tokenise."""
    batch: int = 64
    workers: int = 2
    """Processes that decode."""
    precision: str | None = None
    """fp32, fp16 or bf16; fp16 on a GPU and fp32 on a CPU where it is not given."""
    compile: bool = False
    """Compile the network."""
    grid: int = 0
    """Patches along a side; the network sees 32 pixels a patch."""
    vocabulary: int = 0
    width: int = 500
    """Of the JPEG files, in pixels; these are ImageNet's average."""
    height: int = 375
    quality: int = 90
    output: Path = RESULTS
    """Folder for the record."""


def run(options: TokenizeBenchmark) -> dict[str, Any]:
    """Make the files, warm up on a shard of them, tokenise them all. Returns the record's results.

    The weights are random, so the tokens mean nothing; the codebook is features of the images, so that the exact
    assignment has as few near ties as a fitted one.
    """
    on_gpu = options.device != "cpu"
    before = device_state(torch.device(options.device))
    trunk = TrunkConfig() if on_gpu else SMALL
    grid, images = options.grid or (14 if on_gpu else 4), options.images or (2048 if on_gpu else 96)
    vocabulary = options.vocabulary or (8192 if on_gpu else 256)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        file_bytes = write_images(place / "images", images, options)
        source = open_source(place / "images")
        tokenizer = random_kclip(place / "weights.safetensors", trunk, grid, vocabulary, options)
        tokenizer.set_codebook(rows_of(source, tokenizer, vocabulary), "patches")
        if options.compile:
            tokenizer.compile(options.batch)
        run_of = {"image_size": 16 * grid, "batch_size": options.batch, "workers": options.workers}
        few = Subset(source, range(min(images, 2 * options.batch)))
        tokenize(few, tokenizer, place / "warm_up", device=options.device, **run_of)
        report = tokenize(source, tokenizer, place / "cache", device=options.device, **run_of)
    used = report.time
    return {
        "network": f"CLIP ModifiedResNet, width {trunk.width}, layers {trunk.layers}, random weights",
        "precision": tokenizer.precision, "compile": options.compile, "input_size": tokenizer.input_size,
        "vocabulary": vocabulary, "images": images, "batch": options.batch, "workers": options.workers,
        "jpeg": {"width": options.width, "height": options.height, "mean_bytes": file_bytes // images},
        "images_per_second": round(used.images_per_second, 2), "seconds": round(used.seconds, 3),
        "waited_seconds": {name: round(seconds, 3) for name, seconds in used.waited.items()},
        "shares": {name: round(share, 4) for name, share in used.shares().items()},
        "bottleneck": used.bottleneck, "measured_on": torch.device(options.device).type,
        "state_before": before, "state_after": device_state(torch.device(options.device)),
    }  # fmt: skip


def write_images(folder: Path, count: int, options: TokenizeBenchmark) -> int:
    """JPEG files of coarse shapes under fine noise, whose size is that of photographs. Returns their bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        shapes = np.asarray(coarse.resize((options.width, options.height), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = (shapes + rng.normal(0, 12, shapes.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=options.quality)
    return sum(path.stat().st_size for path in folder.iterdir())


def random_kclip(
    path: Path, trunk: TrunkConfig, grid: int, vocabulary: int, options: TokenizeBenchmark
) -> KClipTokenizer:
    """The tokenizer with random weights, which pass through a file as real ones do."""
    torch.manual_seed(0)
    state = build_trunk(trunk).state_dict()
    for name, values in state.items():
        if name.endswith("bn.weight"):  # the last of a block would be 0, and the block nothing
            values.fill_(0.5)
    save_file(state, path)
    return make_tokenizer(
        "kclip",
        image_size=16 * grid,
        vocabulary=vocabulary,
        device=options.device,
        precision=options.precision,
        weights=path,
    )


def rows_of(source, tokenizer: KClipTokenizer, count: int) -> torch.Tensor:
    """So many different features of the source's images, drawn at random; ValueError where there are too few."""
    few = -(-2 * count // tokenizer.grid**2)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:few]
    batches = (torch.stack([tokenizer.prepare(source.load(int(i))) for i in part]) for part in order.split(16))
    rows = torch.cat([tokenizer.features(batch.to(tokenizer.device)).flatten(0, 1).float().cpu() for batch in batches])
    rows = torch.unique(rows, dim=0)
    if len(rows) < count:
        raise ValueError(f"{len(source)} images have {len(rows)} different features, the codebook needs {count}")
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]
