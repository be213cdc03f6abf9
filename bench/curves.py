"""Do fp32, bf16 and fp16 learn alike? Loss curves of the demo's run in each, on equal batches.

Weights, batches, permutations and drop-path are those of one seed, so that the curves differ by rounding (and by steps
that fp16's loss scaling leaves out) alone. The measure of "alike" is a run in fp32 from the next seed, which sees the
same images: smoothed over 10 steps, a curve may be away from that of fp32 by a tenth of what the other seed's is at
most. Then rounding adds a hundredth, the square, to the variance that chance gives a run.

Nothing is timed but each run as a whole. fp8 (package torchao) is an option that may change the rounding: how far it is
away is told, without a verdict.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.contest import Arena, Contest, Entrant
from bench.guard import Unavailable
from bench.options import Options
from mapet.config import RunConfig
from mapet.data.cache import TokenCache
from mapet.data.images import Subset
from mapet.data.sources import open_source
from mapet.demo.folder import DemoFolder, Timings
from mapet.demo.recipe import FULL, Recipe
from mapet.demo.run import THREADS, threads
from mapet.demo.seed import SeedJob
from mapet.training.loop import pretrain

BASE, OTHER_SEED = "fp32", "fp32_other_seed"
WAYS = (BASE, "bf16", "fp16", "fp8", OTHER_SEED)
STEPS = 200
"""Optimizer steps of each run; the schedule is as long, a fifth of it warm-up."""
SMOOTHED = 10
"""Steps that are averaged before curves are compared."""
PART_OF_SPREAD = 0.1


def contests(chosen: Options, device: torch.device) -> list[Contest]:
    """One: the demo's network on its tokens."""
    sizes = {"steps": STEPS, "batch": FULL.optim.global_batch, "smoothed_over": SMOOTHED}
    opened = partial(arena, FULL, device)
    return [Contest("curves", f"demo, {STEPS} steps", sizes, (), WAYS, BASE, BASE, opened, verdict=True)]


@contextmanager
def arena(recipe: Recipe, device: torch.device) -> Iterator[Arena]:
    """The demo's tokens, and runs over them, each made once."""
    with tempfile.TemporaryDirectory() as folder, threads(THREADS):
        cache = demo_tokens(Path(folder) / "demo", recipe, device)

        @functools.cache
        def losses(way: str) -> tuple[list[float | None], float]:
            began = time.perf_counter()
            config = run_config(recipe, cache, Path(folder) / way, way, device)
            with contextlib.redirect_stdout(io.StringIO()):
                pretrain(config)
            lines = (config.train.output / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line)["loss"] for line in lines], round(time.perf_counter() - began, 1)

        def away(way: str) -> float:
            return largest_difference(losses(way)[0], losses(BASE)[0])

        def entrant(way: str) -> Entrant:
            if way == "fp8" and importlib.util.find_spec("torchao") is None:
                raise Unavailable("the package torchao is not installed")

            def facts() -> dict[str, object]:
                curve, seconds = losses(way)
                return {"losses": curve, "seconds": seconds, "from_fp32": away(way)}

            checked = way in (BASE, "bf16", "fp16")
            return Entrant({}, (lambda: away(way) / away(OTHER_SEED)) if checked else None, facts=facts)

        yield Arena({way: partial(entrant, way) for way in WAYS}, lambda share: {"curve": share / PART_OF_SPREAD})


def demo_tokens(folder: Path, recipe: Recipe, device: torch.device) -> Path:
    """The token cache that the demo makes of the bundled digits."""
    digits = open_source("digits")
    digits = Subset(digits, range(min(recipe.digits, len(digits))))
    job = SeedJob(0, recipe, DemoFolder(folder), str(device), Timings(folder))
    train_images, _ = job.split(digits)
    job.tokens(train_images)
    return job.config.data.cache


def run_config(recipe: Recipe, cache: Path, output: Path, way: str, device: torch.device) -> RunConfig:
    """The demo's run, its schedule shortened to STEPS, reporting each."""
    config = recipe.run(1 if way == OTHER_SEED else 0, cache, output, str(device))
    precision = {"fp8": "bf16", OTHER_SEED: "fp32"}.get(way, way)
    epochs = -(-STEPS // (len(TokenCache.open(cache)) // recipe.optim.global_batch))
    return replace(
        config,
        optim=replace(config.optim, epochs=epochs, warmup_epochs=epochs // 5),
        train=replace(config.train, precision=precision, max_steps=STEPS, log_every=1, save_every=STEPS),
        speed=replace(config.speed, fp8=way == "fp8"),
    )


def smoothed(curve: Sequence[float | None]) -> np.ndarray:
    """Means over SMOOTHED steps in a row, (steps - SMOOTHED + 1,); a loss that is not finite was logged as None."""
    values = np.array([np.nan if value is None else value for value in curve], dtype=float)
    return np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")


def largest_difference(curve: Sequence[float | None], reference: Sequence[float | None]) -> float:
    """Of smoothed curves, over all steps, relative to the reference; infinite where a value is missing."""
    curve, reference = smoothed(curve), smoothed(reference)
    difference = np.abs(curve - reference) / reference
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")
