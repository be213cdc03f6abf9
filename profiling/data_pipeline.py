"""How fast the data side feeds a step: python profiling/data_pipeline.py --cache runs/cache --batch 256 --workers 0 2 4

Images a second of each stage alone: reading batches from the token cache in this process, through a loader with so many
workers, copying them to the device, and the colour jitter that runs there; with --views FOLDER also decoding them and
making a random view of each. A training step can be no faster than the slowest. Without --cache, a temporary one of
random images is made.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from workload import synchronize

from mapet.data.augment import color_jitter, sample_color_jitter
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter
from mapet.data.loader import make_loader
from mapet.data.manifest import CacheDescription
from mapet.data.sources import open_source
from mapet.data.views import ViewConfig, Views
from mapet.task import Batch, Data


@dataclass(frozen=True)
class DataPipeline:
    """What to measure."""

    cache: Annotated[Path | None, tyro.conf.arg(metavar="CACHE")] = None
    """A token cache; a temporary one of random images when not given."""
    images: int = 2048
    """Of the temporary cache."""
    views: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """A folder of images, or a built-in set, to decode and make random views of (mapet/data/views.py)."""
    batch: int = 256
    """Images of a step."""
    workers: tuple[int, ...] = (0, 2)
    """Loader processes to try."""
    steps: int = 20
    """Steps a measurement takes, the first left out."""
    device: str = "cpu"
    """Where the step runs."""
    output: Path = Path("runs/profile")
    """Folder for the numbers."""


def run(options: DataPipeline) -> dict[str, float]:
    """Images a second, by stage."""
    with ExitStack() as stack:
        path = options.cache or random_cache(Path(stack.enter_context(tempfile.TemporaryDirectory())), options.images)
        cache, device = TokenCache.open(path), torch.device(options.device)
        speeds = feeding(options, cache, "cache and loader")
        if options.views:
            data = Views(open_source(options.views), (ViewConfig(size=cache.image_size),))
            speeds |= feeding(options, data, "decoded random views")
        ids = torch.arange(options.batch)
        batch = {"images": cache.images(ids), "tokens": cache.tokens(ids), "ids": ids}
        pinned = {name: value.pin_memory() if device.type == "cuda" else value for name, value in batch.items()}
        draws = sample_color_jitter(options.batch, 0.4, torch.Generator(device).manual_seed(0), device)
        there = to_device(batch, device)
        repeated = [there] * options.steps
        speeds["copy to the device"] = images_per_second(
            [pinned] * options.steps, lambda b: to_device(b, device), device
        )
        speeds["colour jitter"] = images_per_second(repeated, lambda b: color_jitter(b["images"], draws), device)
        return {stage: round(speed, 1) for stage, speed in speeds.items()}


def feeding(options: DataPipeline, data: Data, what: str) -> dict[str, float]:
    """Images a second of a loader, by the number of its workers."""
    speeds = {}
    for workers in options.workers:
        with make_loader(
            data, seed=0, global_batch=options.batch, start_step=0, stop_step=options.steps, workers=workers
        ) as batches:
            speed = images_per_second(batches, lambda batch: None, torch.device("cpu"))
            speeds[f"{what}, {workers} workers"] = speed
    return speeds


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch there, whatever it holds."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def images_per_second(batches: Iterable[Batch], use: Callable[[Batch], object], device: torch.device) -> float:
    """Batches through `use`; the first is not counted, as it starts workers and warms caches."""
    images, start = 0, 0.0
    for number, batch in enumerate(batches):
        use(batch)
        if number == 0:
            synchronize(device)
            start = time.perf_counter()
        else:
            images += len(batch["images"])
    synchronize(device)
    return images / (time.perf_counter() - start)


def random_cache(folder: Path, images: int, *, image_size: int = 224, grid: int = 14) -> Path:
    """A token cache of random crops and tokens, at ImageNet's size."""
    description = CacheDescription(image_size, grid, 8192, "random", "0" * 64, "0" * 64)
    generator = torch.Generator().manual_seed(0)
    with CacheWriter(folder / "cache", description, capacity=images) as writer:
        for number in range(writer.shards):
            with writer.shard(number) as shard:
                for part in torch.as_tensor(writer.positions(number)).split(256):
                    size = (len(part), 3, image_size, image_size)
                    crops = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
                    shard.append(crops, torch.randint(0, 8192, (len(part), grid**2), generator=generator))
                shard.finish()
        writer.finish([f"{i}.png" for i in range(images)])
    return folder / "cache"


def main() -> None:
    options = tyro.cli(DataPipeline, description=__doc__)
    speeds = run(options)
    for stage, speed in speeds.items():
        print(f"{stage:32} {speed:12.1f} images/s")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "data_pipeline.json").write_text(json.dumps(speeds, indent=1) + "\n")


if __name__ == "__main__":
    main()
