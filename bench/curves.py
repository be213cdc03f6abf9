"""python -m bench curves: do fp32, bf16 and fp16 learn alike? Loss curves of the demo's run in each, on equal batches.

Where torchao is installed there is a curve of fp8 too (bf16 with speed.fp8): how far it is away is told, and whether it
is within the same tolerance, but it is an option that may change the rounding, and no failure.

Weights, batches, permutations and drop-path are those of one seed, so that the curves differ by rounding (and by steps
that fp16's loss scaling leaves out) alone. The measure of "alike" is a run in fp32 from the next seed, which sees the
same images: smoothed over 10 steps, a curve may be away from that of fp32 by a tenth of what the other seed's is at
most. Then rounding adds a hundredth, the square, to the variance that chance gives a run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench import records
from mapet.config import RunConfig
from mapet.data.cache import TokenCache
from mapet.data.images import open_source
from mapet.data.subset import Subset
from mapet.demo.folder import DemoFolder, Timings
from mapet.demo.recipe import FULL, QUICK, Recipe
from mapet.demo.run import THREADS, threads
from mapet.demo.seed import SeedJob
from mapet.report.picture import CYCLE, FAINT, INK, frame, save
from mapet.training.loop import pretrain

PRECISIONS = ("fp32", "bf16", "fp16")
FP8 = "fp8"
OTHER_SEED = "fp32, other seed"
SMOOTHED = 10
"""Steps that are averaged before curves are compared."""
PART_OF_SPREAD = 0.1
DASHES = ("-", "--", ":", "-.", "-")


@dataclass(frozen=True)
class CurvesBenchmark:
    """Train the demo's network on its tokens in every precision, and compare the loss curves.

    Attributes:
        steps: optimizer steps of each run; the schedule is as long, a fifth of it warm-up.
        seed: of the tokenizer, the weights and all draws; the next one is the other seed.
        device: cpu or cuda.
        quick: tiny sizes, whose outcome means nothing.
        output: folder for the record and its picture.
    """

    steps: int = 200
    seed: int = 0
    device: str = "cpu"
    quick: bool = False
    output: Path = records.RESULTS

    def run(self) -> None:
        """Train, print, record and draw. SystemExit with code 1 where curves disagree."""
        results = run(self)
        path = records.write("curves", f"demo_{self.device}", results, self.output)
        print(f"record: {path}\npicture: {draw(path)}")
        if not results["agree"]:
            sys.exit("python -m bench curves: the loss curves disagree")


def run(options: CurvesBenchmark) -> dict[str, Any]:
    """The record: configuration, curves and how far each is from that of fp32."""
    recipe = QUICK if options.quick else FULL
    if options.steps < SMOOTHED:
        raise ValueError(f"--steps must be at least {SMOOTHED}, which are averaged; got {options.steps}")
    with tempfile.TemporaryDirectory() as folder, threads(THREADS):
        cache = demo_tokens(Path(folder) / "demo", recipe, options)
        runs = {name: (name, options.seed) for name in PRECISIONS}
        if importlib.util.find_spec("torchao") is not None:
            runs[FP8] = (FP8, options.seed)
        runs[OTHER_SEED] = ("fp32", options.seed + 1)
        curves, seconds, scales = {}, {}, {}
        for name, (precision, seed) in runs.items():
            began = time.perf_counter()
            config = run_config(recipe, options, cache, Path(folder) / name, precision, seed)
            lines = train(config)
            curves[name] = [line["loss"] for line in lines]
            scales[name] = lines[-1]["loss_scale"]
            seconds[name] = round(time.perf_counter() - began, 1)
            print(f"{name}: loss {curves[name][0]:.4f}, then {curves[name][-1]:.4f}, {seconds[name]} s", flush=True)
    verdict = compare(curves)
    for name, difference in verdict["largest_difference"].items():
        print(f"{name}: at most {100 * difference:.3f} % from fp32, smoothed over {SMOOTHED} steps")
    print(f"tolerance: {100 * verdict['tolerance']:.3f} %, a tenth of what the other seed makes")
    return {
        "steps": options.steps,
        "recipe": "quick" if options.quick else "full",
        "batch": recipe.optim.global_batch,
        "parameters": {**{name: getattr(recipe.model, name) for name in ("width", "depth", "vocabulary")}},
        "device_type": options.device,
        "smoothed_over": SMOOTHED,
        **verdict,
        "last_loss_scale": scales,
        "seconds": seconds,
        "curves": curves,
    }


def demo_tokens(folder: Path, recipe: Recipe, options: CurvesBenchmark) -> Path:
    """The token cache that the demo makes of the bundled digits for a seed."""
    digits = open_source("digits")
    digits = Subset(digits, range(min(recipe.digits, len(digits))))
    job = SeedJob(options.seed, recipe, DemoFolder(folder), options.device, Timings(folder))
    train_images, _ = job.split(digits)
    job.tokens(train_images)
    return job.config.data.cache


def run_config(
    recipe: Recipe, options: CurvesBenchmark, cache: Path, output: Path, precision: str, seed: int
) -> RunConfig:
    """The demo's run, its schedule shortened to the steps wanted, reporting each."""
    config = recipe.run(seed, cache, output, options.device)
    if precision == FP8:
        precision, config = "bf16", replace(config, speed=replace(config.speed, fp8=True))
    epochs = -(-options.steps // (len(TokenCache.open(cache)) // recipe.optim.global_batch))
    return replace(
        config,
        optim=replace(config.optim, epochs=epochs, warmup_epochs=epochs // 5),
        train=replace(
            config.train, precision=precision, max_steps=options.steps, log_every=1, save_every=options.steps
        ),
    )


def train(config: RunConfig) -> list[dict[str, float]]:
    """What a run logged, a line each step."""
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config)
    return [json.loads(line) for line in (config.train.output / "metrics.jsonl").read_text().splitlines()]


def compare(curves: dict[str, list[float | None]]) -> dict[str, Any]:
    """The largest relative difference of each smoothed curve from that of fp32, the tolerance, and who keeps within it.

    `agree`: all of PRECISIONS do.

    A loss that is not finite, logged as None, is infinitely far away.
    """
    reference = smoothed(curves["fp32"])
    largest = {name: largest_difference(smoothed(curve), reference) for name, curve in curves.items() if name != "fp32"}
    tolerance = PART_OF_SPREAD * largest[OTHER_SEED]
    within = {name: value <= tolerance for name, value in largest.items() if name != OTHER_SEED}
    agree = all(within[name] for name in PRECISIONS if name != "fp32")
    return {"largest_difference": largest, "tolerance": tolerance, "within_tolerance": within, "agree": agree}


def smoothed(curve: list[float | None]) -> np.ndarray:
    """Means over SMOOTHED steps in a row, (steps - SMOOTHED + 1,)."""
    values = np.array([np.nan if value is None else value for value in curve], dtype=float)
    return np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")


def largest_difference(curve: np.ndarray, reference: np.ndarray) -> float:
    """Over all steps, relative to the reference; infinite where a value is missing."""
    difference = np.abs(curve - reference) / reference
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def draw(path: Path, picture: Path | None = None) -> Path:
    """Draw a record, beside itself if not told where: the curves, and below how far they are from fp32; returns where.

    Raises:
        ValueError: the file is no record of curves.
    """
    record = json.loads(Path(path).read_text())
    if record.get("suite") != "curves":
        raise ValueError(f"{path} is no record of `python -m bench curves`")
    curves = {name: smoothed(curve) for name, curve in record["curves"].items()}
    steps = np.arange(SMOOTHED, SMOOTHED + len(curves["fp32"]))
    figure = Figure(figsize=(8.0, 7.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    looks = dict(zip((*PRECISIONS, FP8, OTHER_SEED), zip((*CYCLE[:4], FAINT), DASHES, strict=True), strict=True))
    for name, curve in curves.items():
        colour, dashes = looks[name]
        style = {"color": colour, "linestyle": dashes, "label": name}
        above.plot(steps, curve, linewidth=1.2 if name == OTHER_SEED else 2.0, **style)
        if name != "fp32":
            difference = 100 * np.abs(curve - curves["fp32"]) / curves["fp32"]
            below.plot(steps, difference, linewidth=1.4, **{**style, "label": None})
    below.axhline(100 * record["tolerance"], color=INK, linewidth=1.0, linestyle="--", label="tolerance")
    below.set_yscale("log")
    above.set_ylabel("loss (nats a token)", color=INK)
    below.set_ylabel("away from fp32 (%)", color=INK)
    below.set_xlabel("optimizer step", color=INK)
    above.set_title(
        f"The demo's run in several precisions, mean of {SMOOTHED} steps", loc="left", color=INK, fontweight="bold"
    )
    for axes in (above, below):
        frame(axes, "y")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best" if axes is above else "lower right")
    return save(figure, picture or Path(path).with_suffix(".png"))
