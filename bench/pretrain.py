"""Pre-training with its data: a token cache on disk, its loader, and the step; and the loaders alone.

The cache is a real one, made of generated pictures in a temporary folder. Ours gathers whole batches of uint8 crops and
jitters them on the device. The official way works image by image in its data workers: colour jitter, normalisation, and
the additive masks of the image's permutation, copied for every head, all of which it sends.

A sample is a block of steps with workers of its own, so that no way prepares data while another is timed. The steps
that empty what the workers had ready before the first one was asked for are left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench import options, step
from bench.contest import Arena, Contest, Entrant, Timed
from bench.official_way import image_masks
from mapet.config import ModelConfig
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter
from mapet.data.loader import Batch, make_loader, step_ids
from mapet.data.manifest import CacheDescription
from mapet.model.vit import IMAGENET_MEAN, IMAGENET_STD

PREFETCHED = 2
"""Batches that a DataLoader's worker has ready: torch's default."""
STEPS = {"cpu": 4, "cuda": 20}
"""Timed steps of a block."""
LOADER_BATCH = 256
LOADER_STEPS = 12
WANTED = 20_000
"""Images per second that the cache is to give on a CPU alone."""


def contests(chosen: options.Options, device: torch.device) -> list[Contest]:
    """For each combination of sizes, pre-training; for each image size, the loaders alone, into memory of the CPU."""
    found, workers = {}, chosen.workers
    for setting in step.settings(replace(chosen, gpu_memory=""), device):
        model = setting.sizes.model
        images = max(chosen.images or (4096 if device.type == "cuda" else 1024), 2 * setting.sizes.batch)
        facts = {"workers": workers, "cached_images": images}
        opened = partial(training_arena, workers=workers, images=images)
        made = setting.contest("pretrain", ("ours", "official"), opened, **facts)
        found[made.name] = replace(made, name=f"{made.name} {workers} workers")
        alone = replace(setting, jitter=0.0, sizes=replace(setting.sizes, batch=min(LOADER_BATCH, images)))
        name = f"loader alone {model.image_size} px {model.heads} heads batch {alone.sizes.batch} {workers} workers"
        facts |= {"image_size": model.image_size, "batch": alone.sizes.batch, "wanted_images_per_second": WANTED}
        ways = ("ours", *(("ours_workers",) if workers else ()), "official")
        opened = partial(loading_arena, alone, workers, images)
        found[name] = Contest("pretrain", name, facts, ("batch",), ways, "ours", "fp32", opened)
    return list(found.values())


@contextmanager
def training_arena(setting: step.Setting, workers: int, images: int) -> Iterator[Arena]:
    """The cache, and both ways over it."""
    with generated_cache(setting.sizes.model, images) as cache:
        ways = {
            "ours": lambda: our_training(setting, cache, workers),
            "official": lambda: official_training(setting, cache, workers),
        }
        yield Arena(ways, step.Judge(setting.sizes.dtype), images=setting.sizes.batch)


def our_training(setting: step.Setting, cache: TokenCache, workers: int) -> Entrant:
    """The loader and the learner of `mapet pretrain`."""
    way = step.OurStep(setting, setting.config)
    (first,) = our_loader(setting, cache, 0, 1)
    block = timed_block(partial(our_loader, setting, cache, workers), way.step, workers, STEPS[setting.device.type])
    return Entrant({"step": block}, lambda: step.results(way, lambda: way.step(0, first)))


def official_training(setting: step.Setting, cache: TokenCache, workers: int) -> Entrant:
    """The official way's workers and step, with the learner's optimizer, clipping and drop-path draws."""
    way = step.OfficialStep(setting)

    def use(number: int, batch: tuple[Tensor, ...]) -> None:
        images, tokens, *masks = (x.to(setting.device, non_blocking=True) for x in batch)
        way.update(images, tokens, masks, way.draws(number, setting.device).get("keep"))

    (first,) = official_loader(setting, cache, 0, 1)
    first = (*first[:2], *way.masks(0))  # a GPU draws other permutations for the learner than the workers' CPU does
    feed = partial(official_loader, setting, cache, workers)
    block = timed_block(feed, use, workers, STEPS[setting.device.type])
    return Entrant({"step": block}, lambda: step.results(way, lambda: use(0, first)))


@contextmanager
def loading_arena(setting: step.Setting, workers: int, images: int) -> Iterator[Arena]:
    """The cache and the loaders; results are the images and tokens of the first step, as ours has them."""
    with generated_cache(setting.sizes.model, images) as cache:
        ids = step_ids(len(cache), seed=0, step=0, global_batch=setting.sizes.batch)
        expected = {"images": cache.images(ids), "tokens": cache.tokens(ids)}

        def entrant(loader: Callable, workers: int, first: Callable[[Any], tuple[Tensor, Tensor]]) -> Entrant:
            feed = partial(loader, setting, cache, workers)
            block = timed_block(feed, lambda number, batch: None, workers, LOADER_STEPS)
            return Entrant({"batch": block}, lambda: first(next(iter(feed(1)))))

        def judge(results: tuple[Tensor, Tensor]) -> dict[str, float]:
            same = zip(expected.items(), results, strict=True)
            return {part: 0.0 if torch.equal(exact, found) else float("inf") for (part, exact), found in same}

        ways = {
            "ours": lambda: entrant(our_loader, 0, lambda batch: (batch["images"], batch["tokens"])),
            "ours_workers": lambda: entrant(our_loader, workers, lambda batch: (batch["images"], batch["tokens"])),
            "official": lambda: entrant(official_loader, workers, lambda batch: (unnormalised(batch[0]), batch[1])),
        }
        yield Arena(ways, judge, images=setting.sizes.batch)


def unnormalised(images: Tensor) -> Tensor:
    """The uint8 images that the official worker normalised."""
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images * deviation + mean) * 255).round().to(torch.uint8)


def timed_block(
    feed: Callable[[int], Iterable[Any]], use: Callable[[int, Any], object], workers: int, count: int
) -> Timed:
    """`count` steps, after those whose batches the workers had ready."""
    left_out = 1 + PREFETCHED * workers

    def prepared() -> tuple[Iterator[Any]]:
        batches = iter(feed(left_out + count))
        for number, batch in enumerate(islice(batches, left_out)):
            use(number, batch)
        return (batches,)

    def block(batches: Iterator[Any]) -> None:
        for number, batch in enumerate(batches, start=left_out):
            use(number, batch)

    return Timed(block, prepared, count)


def our_loader(setting: step.Setting, cache: TokenCache, workers: int, steps: int) -> Iterable[Batch]:
    """Batches of steps 0 to `steps`."""
    batch = setting.sizes.batch
    return make_loader(cache, seed=0, global_batch=batch, start_step=0, stop_step=steps, workers=workers)


def official_loader(setting: step.Setting, cache: TokenCache, workers: int, steps: int) -> Iterable[tuple[Tensor, ...]]:
    """Normalised images, tokens, content and query masks, and which tokens are targets, of steps 0 to `steps`."""
    places = [
        [(number, place, identity) for place, identity in enumerate(ids.tolist())]
        for number in range(steps)
        for ids in [step_ids(len(cache), seed=0, step=number, global_batch=setting.sizes.batch)]
    ]
    return DataLoader(
        OfficialImages(setting, cache),
        batch_sampler=places,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )


class OfficialImages(Dataset):
    """What an official data worker does for one image, asked for by (step, place in the batch, image in the cache)."""

    def __init__(self, setting: step.Setting, cache: TokenCache) -> None:
        self.cache, self.cut, self.heads = cache, setting.sizes.cut, setting.sizes.model.heads
        self.draws, self.drawn = step.StepDraws(setting.config), (-1, None)
        self.mean, self.deviation = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, ...]:
        number, place, identity = key
        if self.drawn[0] != number:  # a worker gets whole batches, so that drawing costs it next to nothing
            self.drawn = number, self.draws(number, torch.device("cpu"))
        ids = torch.tensor([identity])
        draws = {name: value[place : place + 1] for name, value in self.drawn[1].items()}
        images = step.colored(self.cache.images(ids), draws)
        masks = image_masks(draws["permutation"][0], self.cut, self.heads)
        return (images[0] - self.mean) / self.deviation, self.cache.tokens(ids)[0], *masks


@contextmanager
def generated_cache(model: ModelConfig, images: int) -> Iterator[TokenCache]:
    """A token cache of random crops and tokens in a temporary folder."""
    description = CacheDescription(model.image_size, model.grid, model.vocabulary, "generated", "0" * 64, "0" * 64)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with CacheWriter(path, description, capacity=images) as writer:
            for number in range(writer.shards):
                with writer.shard(number) as shard:
                    for part in torch.as_tensor(writer.positions(number)).split(256):
                        size = (len(part), 3, model.image_size, model.image_size)
                        crops = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
                        tokens = torch.randint(0, model.vocabulary, (len(part), model.patches), generator=generator)
                        shard.append(crops, tokens)
                    shard.finish()
            writer.finish([f"{i}.png" for i in range(images)])
        yield TokenCache.open(path)
