"""One optimizer step of MaPeT against the official way of attending, on the same weights and permutations."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.official_way import OfficialWay, batch_masks
from bench.records import RESULTS, quantiles
from mapet.config import ModelConfig
from mapet.objectives import MaPeT

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}


@dataclass(frozen=True)
class StepBenchmark:
    """Sizes of the measured step."""

    model: str = "tiny"
    batch: int = 8
    dtype: str = "fp32"
    cut: int = 50
    repeats: int = 10
    device: str = "cpu"
    compile: bool = False
    output: Path = RESULTS


def run(options: StepBenchmark) -> dict[str, Any]:
    """Check that both ways give one loss and one gradient, then time them in turn. Returns the record's results.

    `official` excludes building the masks, which the official code does in data workers; `official_with_masks` builds
    them on the step's own cores.

    Raises:
        RuntimeError: the results differ; nothing is timed then.
    """
    torch.manual_seed(0)
    config = ModelConfig.preset(options.model)
    ours = MaPeT(config, options.cut).to(options.device)
    official = OfficialWay(copy.deepcopy(ours.model))
    generator = torch.Generator().manual_seed(0)
    plan = ours.sample_plan(options.batch, generator, "cpu")
    keep = plan.keep.to(options.device)
    shape = (options.batch, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(options.device)
    tokens = torch.randint(0, config.vocabulary, (options.batch, config.patches), generator=generator).to(
        options.device
    )
    permutation = plan.permutation.to(options.device)
    normalised = (images / 255 - ours.model.image_mean.view(3, 1, 1)) / ours.model.image_std.view(3, 1, 1)
    masks = [m.to(options.device) for m in batch_masks(plan.permutation, options.cut, config.heads)]
    forward = torch.compile(ours) if options.compile else ours

    def ours_loss() -> Tensor:
        return forward(images, tokens, permutation, keep, with_accuracy=False)[0]

    def official_loss() -> Tensor:
        return official(normalised, tokens, *masks, keep)

    def official_loss_with_masks() -> Tensor:
        built = [m.to(options.device) for m in batch_masks(plan.permutation, options.cut, config.heads)]
        return official(normalised, tokens, *built, keep)

    difference = _check(ours_loss, official_loss, ours, official, options)
    steps = {
        "ours": _step(ours_loss, ours, options),
        "official": _step(official_loss, official, options),
        "official_with_masks": _step(official_loss_with_masks, official, options),
    }
    seconds = _interleaved(steps, options)
    timings = {name: quantiles(values) for name, values in seconds.items()}
    base = timings["ours"]["p50_ms"]
    return {
        "model": options.model, "batch": options.batch, "dtype": options.dtype, "cut": options.cut,
        "compile": options.compile, "timings": timings, "largest_difference": difference,
        "ratio_to_official": round(timings["official"]["p50_ms"] / base, 3),
        "ratio_to_official_with_masks": round(timings["official_with_masks"]["p50_ms"] / base, 3),
        "images_per_second": round(options.batch / base * 1e3, 2),
    }  # fmt: skip


def _autocast(options: StepBenchmark):
    dtype = DTYPES[options.dtype]
    return nullcontext() if dtype is None else torch.autocast(torch.device(options.device).type, dtype)


def _check(ours_loss, official_loss, ours, official, options: StepBenchmark) -> dict[str, float]:
    with _autocast(options):
        losses = ours_loss(), official_loss()
    for loss in losses:
        loss.backward()
    pairs = zip(ours.model.parameters(), official.model.parameters(), strict=True)
    norms = [((a.grad - b.grad).norm() / b.grad.norm().clamp(min=1e-12)).item() for a, b in pairs]
    difference = {"loss": abs(losses[0] - losses[1]).item(), "gradient_norm": max(norms)}
    tolerance = LOSS_TOLERANCE[options.dtype]
    if not (difference["loss"] <= tolerance and difference["gradient_norm"] <= 10 * tolerance):
        raise RuntimeError(f"the two ways disagree, so nothing was timed: {difference}, tolerance {tolerance}")
    return difference


def _step(loss_of: Callable[[], Tensor], module: torch.nn.Module, options: StepBenchmark) -> Callable[[], None]:
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.05)

    def step() -> None:
        with _autocast(options):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _interleaved(steps: dict[str, Callable[[], None]], options: StepBenchmark) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 2):  # the first two of each are warm-up
        for name, step in steps.items():
            _synchronize(options)
            start = time.perf_counter()
            step()
            _synchronize(options)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(options: StepBenchmark) -> None:
    if options.device != "cpu":
        torch.cuda.synchronize()
