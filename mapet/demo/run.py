"""The demo from end to end: seeds one after the other, the exported model, pictures and the report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mapet import words
from mapet.checked import check
from mapet.config import Count
from mapet.data.images import ImageSource, open_source
from mapet.data.subset import Subset
from mapet.demo.folder import DemoFolder, SeedResult, Timings
from mapet.demo.pictures import draw_pictures
from mapet.demo.recipe import FULL, QUICK
from mapet.demo.report import DemoRun, write_report
from mapet.demo.seed import SeedJob
from mapet.distributed import pick_device
from mapet.folders import check_place, locked
from mapet.model.export import export
from mapet.report.loss_curve import read_metrics
from mapet.training.checkpoint import load_weights

THREADS = 1
"""Of torch's operations on the CPU. The matrices are too small to share out: a second thread gained a few percent on an
idle machine, and made the run ten times slower where another process wanted the core it waits on."""


def run_demo(output: Path, *, seeds: int = 3, device: str = "auto", quick: bool = False) -> None:
    """Run the demo, or go on with it: what is done in the output folder is kept, under the same settings only.

    Raises:
        ConfigError: the folder holds something else, or a demo with other settings.
        MapetError: whatever else stands in the way.
        KeyboardInterrupt: Ctrl-C; SystemExit with code 143 after SIGTERM. The next call goes on from there.
    """
    check(Count, seeds, "seeds")
    recipe, chosen = QUICK if quick else FULL, pick_device(device, None)
    command = ["mapet", "demo", "--output", str(output), "--seeds", str(seeds), "--device", device]
    check_place(output, "demo")
    with locked(output, "demo"):
        folder = DemoFolder(output)
        folder.claim(recipe, chosen.type)
        cost = "under a minute" if quick else f"about {1 + 1.5 * seeds:.0f} minutes on a CPU"
        say(f"{seeds} seeds on {chosen}, into {output}; {cost}. Ctrl-C is safe: the same command goes on")
        timings, digits = Timings(output), open_source("digits")
        digits = Subset(digits, range(min(recipe.digits, len(digits))))
        jobs = [SeedJob(seed, recipe, folder, str(chosen), timings) for seed in range(seeds)]
        with threads(THREADS):
            results = [result_of(job, digits, seeds) for job in jobs]
            with timings.stage("export", anew=True):
                model, _, weights = load_weights(jobs[0].config.train.output)
                exported = export(model, weights, output / "timm_model", name="mapet_demo")
                say(f"timm loads {exported.folder}: same features, to {exported.largest_difference:.1e}")
            with timings.stage("pictures", anew=True):
                say("pictures: loss, who sees whom, codebooks of digits and of photographs; about half a minute")
                pictures = draw_pictures(folder, recipe, results)
        report = DemoRun(
            command=shlex.join([*command, *(["--quick"] if quick else [])]),
            device=str(chosen),
            recipe=recipe,
            results=results,
            losses=[float(read_metrics(folder.metrics(result.seed)).loss[-1]) for result in results],
            timings=timings.seconds,
            pictures=pictures,
            export=exported,
        )
        say(f"done: {write_report(output / 'report.md', report)} has the numbers and the pictures")


def result_of(job: SeedJob, digits: ImageSource, seeds: int) -> SeedResult:
    """The result of a seed, which is kept where it is there already."""
    name = f"seed {job.seed} ({job.seed + 1} of {seeds})"
    result = job.folder.load_result(job.seed)
    if result is not None:
        say(f"{name} is done already")
    else:
        say(f"{name}: fit a tokenizer, tokenise, pre-train, evaluate")
        result = job.run(digits)
    say(f"seed {job.seed}: {headline(result)}")
    return result


def headline(result: SeedResult) -> str:
    """A line of scores."""
    method, few = "linear probe, last layer", next(s.labels for s in result.pretrained.scores if s.labels != "all")
    groups = {"pre-trained": result.pretrained, "random": result.random_init, "pixels": result.raw_pixels}
    scores = [
        f"{name} {100 * run.accuracy(method):.1f} % ({100 * run.accuracy(method, few):.1f} %)"
        for name, run in groups.items()
    ]
    return f"linear probe with all labels ({few}): {', '.join(scores)}"


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
