"""The demo from end to end: seeds one after the other, the exported model, pictures and the report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch

from mapet import words
from mapet.checked import at_least, check_fields
from mapet.data.cache import TokenCache
from mapet.data.images import ImageSource, Subset
from mapet.data.sources import open_source
from mapet.demo.describe import demo_results, token_entropy
from mapet.demo.folder import DemoFolder, SeedResult, Timings
from mapet.demo.pictures import digit_gallery, loss_picture, photo_gallery, visibility_picture
from mapet.demo.recipe import FULL, QUICK, Recipe
from mapet.demo.report import Picture, write_report
from mapet.demo.seed import SeedJob, Stopped
from mapet.distributed import pick_device
from mapet.errors import CheckpointError
from mapet.evaluate import CacheImages, extract_features
from mapet.folders import check_place, locked
from mapet.model.export import TOLERANCE, ExportReport, export, to_timm
from mapet.training.checkpoint import load_weights

THREADS = 1
"""Of torch's operations on the CPU. The matrices are too small to share out: a second thread gained a few percent on an
idle machine, and made the run ten times slower where another process wanted the core it waits on."""
INTERRUPTED = 130


@dataclass(frozen=True)
class DemoOptions:
    """Options of `mapet demo`."""

    output: Path = Path("runs/demo")
    seeds: Annotated[int, at_least(1, 1000)] = 3
    device: str = "auto"
    quick: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def command(self) -> str:
        """The command line that makes the same."""
        words = ["mapet", "demo", "--output", str(self.output), "--seeds", str(self.seeds), "--device", self.device]
        return shlex.join([*words, *(["--quick"] if self.quick else [])])


def run_demo(options: DemoOptions) -> None:
    """Run the demo, or go on with it: what is done in the output folder is kept, under the same settings only.

    Raises:
        ConfigError: the folder holds something else, or a demo with other settings.
        MapetError: whatever else stands in the way.
        KeyboardInterrupt: Ctrl-C; SystemExit with code 143 after SIGTERM. The next call goes on from there.
    """
    recipe = QUICK if options.quick else FULL
    device = pick_device(options.device, None)
    check_place(options.output, "demo")
    with locked(options.output, "demo"):
        run_in(DemoFolder(options.output), options, recipe, device)


def run_in(folder: DemoFolder, options: DemoOptions, recipe: Recipe, device: torch.device) -> None:
    """As `run_demo`, in a folder that is this process's."""
    folder.claim(recipe, device.type)
    cost = "under a minute" if options.quick else f"about {1 + 1.5 * options.seeds:.0f} minutes on a CPU"
    say(f"{options.seeds} seeds on {device}, into {folder.root}; {cost}. Ctrl-C is safe: the same command goes on")
    timings = Timings(folder.root)
    digits = open_source("digits")
    digits = Subset(digits, range(min(recipe.digits, len(digits))))
    jobs = [SeedJob(seed, recipe, folder, str(device), timings) for seed in range(options.seeds)]
    with threads(THREADS):
        results = run_seeds(jobs, digits)
        with timings.stage("export", anew=True):
            exported = export_first(jobs[0])
        with timings.stage("pictures", anew=True):
            pictures = draw_pictures(folder, recipe, results)
    report = demo_results(
        folder,
        recipe,
        results,
        command=options.command,
        device=str(device),
        timings=timings,
        pictures=pictures,
        export=exported,
    )
    say(f"done: {write_report(folder.root / 'report.md', report)} has the numbers and the pictures")


def run_seeds(jobs: Sequence[SeedJob], digits: ImageSource) -> list[SeedResult]:
    """The results of all seeds; those that are there already are kept."""
    results = []
    for job in jobs:
        name = f"seed {job.seed} ({job.seed + 1} of {len(jobs)})"
        result = job.folder.load_result(job.seed)
        if result is not None:
            say(f"{name} is done already")
        else:
            say(f"{name}: fit a tokenizer, tokenise, pre-train, evaluate")
            result = finish_or_stop(job, digits)
        say(f"seed {job.seed}: {headline(result)}")
        results.append(result)
    return results


def finish_or_stop(job: SeedJob, digits: ImageSource) -> SeedResult:
    """The result of a seed; a signal during pre-training ends the process as the signal would."""
    try:
        return job.run(digits)
    except Stopped as stopped:
        if stopped.exit_code == INTERRUPTED:
            raise KeyboardInterrupt("stopped by Ctrl-C; the same command goes on from the last checkpoint") from None
        raise SystemExit(stopped.exit_code) from None


def headline(result: SeedResult) -> str:
    """A line of scores."""
    method, few = "linear probe, last layer", next(s.labels for s in result.pretrained.scores if s.labels != "all")
    groups = {"pre-trained": result.pretrained, "random": result.random_init, "pixels": result.raw_pixels}
    scores = [
        f"{name} {100 * run.accuracy(method):.1f} % ({100 * run.accuracy(method, few):.1f} %)"
        for name, run in groups.items()
    ]
    return f"linear probe with all labels ({few}): {', '.join(scores)}"


def export_first(job: SeedJob) -> ExportReport:
    """Export the first seed's network for timm; CheckpointError unless timm's features are those that were scored."""
    model, _, weights = load_weights(job.config.train.output)
    exported = export(model, weights, job.folder.root / "timm_model", name="mapet_demo")
    loaded = timm.create_model(f"local-dir:{exported.folder}", pretrained=True)
    cache = TokenCache.open(job.config.data.cache)
    images = CacheImages(cache, np.arange(min(64, len(cache))))
    ours, theirs = (extract_features(vit, images).values for vit in (to_timm(model, weights), loaded))
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    if not difference <= TOLERANCE:
        raise CheckpointError(f"{exported.folder}: timm's features of the digits differ by {difference:.1e}")
    say(f"timm loads {exported.folder}: same features on {len(images)} digits, to {difference:.1e}")
    return exported


def draw_pictures(folder: DemoFolder, recipe: Recipe, results: Sequence[SeedResult]) -> tuple[Picture, ...]:
    """All pictures, drawn anew."""
    say("pictures: loss, who sees whom, codebooks of digits and of photographs; about half a minute")
    return (
        loss_picture(folder, recipe, [result.seed for result in results], token_entropy(results)),
        visibility_picture(folder),
        digit_gallery(folder, results[0].seed),
        photo_gallery(folder, recipe.photos),
    )


def say(text: str) -> None:
    """A plain line for the person watching."""
    words.say(f"demo: {text}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads in torch's operations within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
