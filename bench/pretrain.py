"""Pre-training with its data: a token cache on disk, its loader, and the step; and the loaders alone.

The cache is a real one, made of generated pictures in a temporary folder. Ours gathers whole batches of uint8 crops and
jitters them on the device. The official way works image by image in its data workers: colour jitter, normalisation, and
the additive masks of the image's permutation, copied for every head, all of which it sends.

A sample is a block of steps with workers of its own, so that no way prepares data while another is timed. The steps
that empty what the workers had ready before the first one was asked for are left out.
"""

from __future__ import annotations

import tempfile
import time
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
from bench.contest import Arena, Contest, Entrant
from bench.official_way import image_masks
from bench.timing import Clock
from mapet.config import ModelConfig, RunConfig
from mapet.data.augment import JitterDraws, color_jitter
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter
from mapet.data.loader import Batch, make_loader, step_ids
from mapet.data.manifest import CacheDescription
from mapet.distributed import World
from mapet.model.vit import IMAGENET_MEAN, IMAGENET_STD
from mapet.objectives import Plan, build_objective
from mapet.training.learner import AUTOCAST, Learner, draw_step

PREFETCHED = 2
"""Batches that a DataLoader's worker has ready: torch's default."""
STEPS = {"cpu": 4, "cuda": 20}
"""Timed steps of a block."""
LOADER_BATCH = 256
LOADER_STEPS = 12
FP16_SCALE = 1024.0
WANTED = 20_000
"""Images per second that the cache is to give on a CPU alone."""


class Plans:
    """The random draws of every step, on the CPU, for workers and for the check alike."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.objective = build_objective(config.objective, config.model)  # on the CPU: workers must not touch a GPU

    def step(self, number: int) -> tuple[Plan, JitterDraws | None]:
        """Permutations, drop-path and colours of a step."""
        return draw_step(self.config, self.objective, number, torch.device("cpu"))


def contests(chosen: options.Options, device: torch.device) -> list[Contest]:
    """For each combination of sizes, pre-training; for each image size, the loaders alone."""
    found = {}
    for sizes in options.combinations(chosen, device):
        setting = step.Setting(sizes, device, chosen.jitter, compile=False, backend=chosen.backend)
        images = max(chosen.images or (4096 if device.type == "cuda" else 1024), 2 * sizes.batch)
        for made in (training(setting, chosen.workers, images), loading(setting, chosen.workers, images)):
            found[made.name] = made
    return list(found.values())


def training(setting: step.Setting, workers: int, images: int) -> Contest:
    """Steps fed from the cache, both ways."""
    sizes = setting.sizes.record() | {"jitter": setting.jitter, "workers": workers, "cached_images": images}
    return Contest(
        "pretrain", f"{setting.sizes.name} {workers} workers", sizes, ("step",), ("ours", "official"), "ours",
        setting.sizes.dtype, partial(training_arena, setting, workers, images),
    )  # fmt: skip


def loading(setting: step.Setting, workers: int, images: int) -> Contest:
    """The loaders of both ways without a step: batches in memory of the CPU."""
    model = setting.sizes.model
    batch = min(LOADER_BATCH, images)
    ways = ("ours", *(("ours_workers",) if workers else ()), "official")
    sizes = {
        "image_size": model.image_size, "tokens": model.tokens, "batch": batch, "workers": workers,
        "cached_images": images, "wanted_images_per_second": WANTED, "labelled": "CPU alone",
    }  # fmt: skip
    name = f"loader alone {model.image_size} px {model.heads} heads batch {batch} {workers} workers"
    return Contest("pretrain", name, sizes, ("batch",), ways, "ours", "fp32", partial(
        loading_arena, replace(setting, sizes=replace(setting.sizes, batch=batch)), workers, images
    ))  # fmt: skip


@contextmanager
def training_arena(setting: step.Setting, workers: int, images: int) -> Iterator[Arena]:
    """The cache, and both ways over it."""
    with generated_cache(setting.sizes.model, images) as path:
        cache = TokenCache.open(path)
        count = STEPS[setting.device.type]
        yield Arena(
            {
                "ours": lambda: our_training(setting, setting.config, cache, workers, count),
                "official": lambda: official_training(setting, cache, workers, count),
            },
            step.Judge(setting.sizes.dtype),
            images=setting.sizes.batch,
        )


def our_training(setting: step.Setting, config: RunConfig, cache: TokenCache, workers: int, count: int) -> Entrant:
    """The loader and the learner of `mapet pretrain`."""
    learner = Learner(config, World(setting.device), setting.plan)
    feed = partial(our_loader, cache, setting.sizes.batch, workers, color_jitter=config.worker_jitter)

    def use(number: int, batch: Batch) -> None:
        learner.step(number, batch, with_accuracy=False)

    def results() -> step.StepResults:
        batch: Batch = next(iter(our_loader(cache, setting.sizes.batch, 0, 1))).to(setting.device)
        plan, draws = Plans(setting.config).step(0)
        images = batch.images / 255 if draws is None else color_jitter(batch.images.cpu(), draws)
        keep = plan.keep.to(setting.device) if setting.config.model.drop_path else None
        permutation = plan.permutation.to(setting.device)

        def loss() -> Tensor:
            return learner.objective(images.to(setting.device), batch.tokens, permutation, keep, False)[0]

        return gradients_of(loss, learner.objective, setting)

    return Entrant(block_sample("step", feed, use, workers, count, setting.device), results)


def official_training(setting: step.Setting, cache: TokenCache, workers: int, count: int) -> Entrant:
    """The official way's workers and step, with the learner's optimizer, clipping and drop-path draws."""
    peer = step.OfficialStep(setting)
    plans = Plans(setting.config)
    feed = partial(official_loader, cache, plans, workers)

    def use(number: int, batch: tuple[Tensor, ...]) -> None:
        images, tokens, *masks = (x.to(setting.device, non_blocking=True) for x in batch)
        peer.update(images, tokens, masks, peer.keep(plans.step(number)[0]))

    def results() -> step.StepResults:
        images, tokens, *masks = (x.to(setting.device) for x in next(iter(official_loader(cache, plans, 0, 1))))
        keep = peer.keep(plans.step(0)[0])
        return gradients_of(lambda: peer.network(images, tokens, *masks, keep), peer.objective, setting)

    return Entrant(block_sample("step", feed, use, workers, count, setting.device), results)


def gradients_of(loss_of: Callable[[], Tensor], module: torch.nn.Module, setting: step.Setting) -> step.StepResults:
    """Loss, gradient norm and gradients of one forward and backward pass; the weights stay."""
    dtype = AUTOCAST.get(setting.config.train.precision)
    with torch.autocast(setting.device.type, dtype, enabled=dtype is not None):
        loss = loss_of()
    scale = FP16_SCALE if dtype == torch.float16 else 1.0
    (loss * scale).backward()
    gradients = {name: p.grad / scale for name, p in module.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values()).item()
    module.zero_grad(set_to_none=True)
    return step.StepResults(loss.item(), norm, gradients)


@contextmanager
def loading_arena(setting: step.Setting, workers: int, images: int) -> Iterator[Arena]:
    """The cache and the loaders; results are the images and tokens of the first step, as ours has them."""
    with generated_cache(setting.sizes.model, images) as path:
        cache, batch = TokenCache.open(path), setting.sizes.batch
        plans = Plans(replace(setting.config, data=replace(setting.config.data, color_jitter=0.0)))
        ids = step_ids(len(cache), seed=0, step=0, global_batch=batch)
        expected = cache.images(ids), cache.tokens(ids)

        def ours(count: int) -> Entrant:
            feed = partial(our_loader, cache, batch, count)

            def first() -> tuple[Tensor, Tensor]:
                got: Batch = next(iter(feed(1)))
                return got.images, got.tokens

            return loader_entrant(feed, count, first)

        def official() -> Entrant:
            feed = partial(official_loader, cache, plans, workers)
            return loader_entrant(feed, workers, lambda: unnormalised(*next(iter(feed(1)))[:2]))

        ways = {"ours": lambda: ours(0), "ours_workers": lambda: ours(workers), "official": official}
        yield Arena(ways, partial(equal_batches, expected), images=batch)


def loader_entrant(feed: Callable[[int], Iterable[Any]], workers: int, first: Callable[[], Any]) -> Entrant:
    """A loader alone."""
    return Entrant(
        block_sample("batch", feed, lambda number, batch: None, workers, LOADER_STEPS, torch.device("cpu")), first
    )


def equal_batches(expected: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor]) -> dict[str, float]:
    """0 where images and tokens are equal, else infinite."""
    same = (torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    return {part: 0.0 if equal else float("inf") for part, equal in zip(("images", "tokens"), same, strict=True)}


def unnormalised(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The uint8 images that the official worker normalised."""
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images * deviation + mean) * 255).round().to(torch.uint8), tokens


def block_sample(
    phase: str,
    feed: Callable[[int], Iterable[Any]],
    use: Callable[[int, Any], None],
    workers: int,
    count: int,
    device: torch.device,
) -> Callable[[Clock], dict[str, float]]:
    """Seconds of a step, as the mean over `count` steps of a block; wall-clock time, since the host's work counts."""
    left_out = 1 + PREFETCHED * workers

    def sample(clock: Clock) -> dict[str, float]:
        batches = iter(feed(left_out + count))
        for number, batch in enumerate(islice(batches, left_out)):
            use(number, batch)
        synchronize(device)
        start = time.perf_counter()
        for number, batch in enumerate(batches, start=left_out):
            use(number, batch)
        synchronize(device)
        return {phase: (time.perf_counter() - start) / count}

    return sample


def our_loader(
    cache: TokenCache, batch: int, workers: int, steps: int, *, color_jitter: float = 0.0
) -> Iterable[Batch]:
    """Batches of steps 0 to `steps`; with `color_jitter` the workers change the colours."""
    return make_loader(
        cache,
        seed=0,
        global_batch=batch,
        start_step=0,
        stop_step=steps,
        workers=workers,
        color_jitter=color_jitter,
    )


def official_loader(cache: TokenCache, plans: Plans, workers: int, steps: int) -> Iterable[tuple[Tensor, ...]]:
    """Normalised images, tokens, content and query masks, and which tokens are targets, of steps 0 to `steps`."""
    batch = plans.config.optim.global_batch
    places = [
        [(number, place, identity) for place, identity in enumerate(ids.tolist())]
        for number in range(steps)
        for ids in [step_ids(len(cache), seed=0, step=number, global_batch=batch)]
    ]
    return DataLoader(
        OfficialImages(cache, plans),
        batch_sampler=places,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )


class OfficialImages(Dataset):
    """What an official data worker does for one image, asked for by (step, place in the batch, image in the cache)."""

    def __init__(self, cache: TokenCache, plans: Plans) -> None:
        self.cache, self.cut, self.heads = cache, plans.config.objective.cut, plans.config.model.heads
        self.plans, self.drawn = plans, (-1, None, None)
        self.mean, self.deviation = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, ...]:
        number, place, identity = key
        ids, here = torch.tensor([identity]), slice(place, place + 1)
        if self.drawn[0] != number:  # a worker gets whole batches, so that drawing costs it next to nothing
            self.drawn = number, *self.plans.step(number)
        _, plan, draws = self.drawn
        pixels = self.cache.images(ids)
        image = (pixels / 255 if draws is None else color_jitter(pixels, draws[here]))[0]
        masks = image_masks(plan.permutation[place], self.cut, self.heads)
        return (image - self.mean) / self.deviation, self.cache.tokens(ids)[0], *masks


@contextmanager
def generated_cache(model: ModelConfig, images: int) -> Iterator[Path]:
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
        yield path


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
