"""The written report of the demo: every number with its spread, and sentences that follow from the numbers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mapet.demo.folder import SeedResult
from mapet.demo.recipe import Recipe
from mapet.errors import DataError
from mapet.files import write_whole
from mapet.machine import machine_findings
from mapet.model.export import ExportReport
from mapet.report.markdown import document, table
from mapet.report.picture import Picture
from mapet.words import in_line, printable

Verdict = Literal["better", "worse", "within the spread", "one seed"]
KINDS = {"pretrained": "MaPeT pre-training", "random_init": "random initialisation", "raw_pixels": "raw pixels"}
BASELINES = {"random_init": "the same network at random initialisation", "raw_pixels": "raw pixels"}


@dataclass(frozen=True)
class DemoRun:
    """All that the report tells, besides the machine."""

    command: str
    device: str
    recipe: Recipe
    results: Sequence[SeedResult]
    """At least one."""
    losses: Sequence[float]
    """In which the pre-training of each seed ended, in nats a token."""
    timings: Mapping[str, float]
    """Seconds of every stage."""
    pictures: Sequence[Picture]
    export: ExportReport


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of one number over seeds."""

    mean: float
    deviation: float
    """NaN for one seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)

    def percent(self) -> str:
        """As text, in percent."""
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.deviation) else f" ± {100 * self.deviation:.1f}")


def compare(a: Spread, b: Spread) -> Verdict:
    """Whether a is better than b. A difference of means up to sqrt(sd_a^2 + sd_b^2) counts as within the spread."""
    if math.isnan(a.deviation) or math.isnan(b.deviation):
        return "one seed"
    if abs(a.mean - b.mean) <= math.hypot(a.deviation, b.deviation):
        return "within the spread"
    return "better" if a.mean > b.mean else "worse"


def write_report(path: Path, run: DemoRun) -> Path:
    """Write report.md, whole or not at all. Raises DataError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, printable(render(run, path.parent)))
    except OSError as error:
        raise DataError(f"could not write the report {path}: {error}") from error
    return path


def render(run: DemoRun, folder: Path) -> str:
    """The report as Markdown, for a file in `folder`."""
    machine = [f"- {found.subject}: {found.detail}" for found in machine_findings()]
    seconds = {**run.timings, "all": sum(run.timings.values())}
    return document(
        ["# MaPeT demo", "", f"Made by `{in_line(run.command)}`."],
        ["## What was run", "", *table(("", ""), _facts(run.recipe, run.results[0]))],
        ["## Top-1 accuracy on the test images", "", *_accuracy_section(run.results)],
        ["## What the numbers say", "", *_comparison_section(run.results)],
        ["## Pre-training", "", _loss_sentence(run)],
        *(picture.markdown(folder) for picture in run.pictures),
        [
            "## The exported model",
            "",
            f"`{run.export.folder.name}` holds a timm vision transformer of {run.export.parameters:,} parameters."
            " Its features are those of the pre-training model, to"
            f" {run.export.largest_difference:.1e} of the largest one.",
            *("", "```python", "import timm", "", f"model = {run.export.load_line}", "```"),
        ],
        ["## Time", "", *table(("stage", "seconds"), [(stage, f"{time:.1f}") for stage, time in seconds.items()])],
        ["## Machine", "", *machine, f"- device of this run: {run.device}"],
    )


def _facts(recipe: Recipe, result: SeedResult) -> list[tuple[str, str]]:
    model, optim, train = recipe.model, recipe.optim, result.pretrained.train_images
    steps = optim.epochs * (train // optim.global_batch)
    return [
        ("images", f"scikit-learn's digits, 8 x 8 pixels, enlarged to {model.image_size} (bicubic)"),
        ("split", f"{train} training and {result.pretrained.test_images} test images, drawn class by class per seed"),
        ("seen in pre-training", "the training images without labels; tokenizer and network never see a test image"),
        (
            "raw pixels",
            f"the same images as {3 * model.image_size**2} numbers: a strong baseline, for digits are centred and of"
            " one size, so that the same strokes lie in the same places",
        ),
        ("tokenizer", f"k-means over the pixels of patches, {model.vocabulary} entries, fitted per seed"),
        (
            "network",
            f"{model.depth} blocks of width {model.width}, {model.heads} heads, {model.grid} x {model.grid} patches of"
            f" {model.patch_size} pixels and a class token, layer scale {model.layer_scale:g}",
        ),
        (
            "objective",
            f"MaPeT; {model.tokens - recipe.cut} of {model.tokens} tokens are predicted (cut {recipe.cut}, class token"
            f" included), colour jitter {recipe.color_jitter:g}",
        ),
        ("pre-training", f"{optim.epochs} epochs, {steps} steps of {optim.global_batch} images, lr {optim.lr:g}"),
        (
            "linear probe",
            f"the paper's, {recipe.probe.epochs} epochs at lr {recipe.probe.lr:g}, but batch {recipe.probe.batch} in"
            " place of 1024, which would be one or two steps an epoch here; the same for all three kinds of features",
        ),
        (
            "choice of sizes",
            "by some twenty trial runs, judged on the test images of seed 0: a slight advantage to MaPeT there",
        ),
        ("a seed changes", "the split, tokenizer, initialisation, order of images, and which few labels are used"),
    ]


def _accuracy_section(results: Sequence[SeedResult]) -> list[str]:
    first, seeds = results[0].pretrained, ", ".join(str(result.seed) for result in results)
    spread = "mean ± standard deviation" if len(results) > 1 else "no spread, for there is one seed"
    rows = [
        (*measured, *(_spread(results, kind, measured).percent() for kind in KINDS)) for measured in _measured(results)
    ]
    return [
        f"Percent; {spread}, over seeds {seeds}. {first.train_images} training images, {first.test_images} test images,"
        f" {first.classes} classes (chance: {100 / first.classes:.1f} %).",
        "",
        *table(("method", "labels", *KINDS.values()), rows),
        "",
        "Features are frozen. kNN and logistic regression read the last block. The linear probe trains a classifier on"
        ' every block; "best layer" picks block and epoch by their accuracy on the test images, as BEiT does,'
        ' and is therefore optimistic; "last layer" picks nothing. Images are squares, and whole: BEiT enlarges them to'
        " 256 pixels and tests on the middle 224.",
    ]


def _comparison_section(results: Sequence[SeedResult]) -> list[str]:
    """Tallies and a table of differences: MaPeT against both baselines."""
    rows, lines = [list(measured) for measured in _measured(results)], []
    for kind, name in BASELINES.items():
        verdicts = []
        for row, measured in zip(rows, _measured(results), strict=True):
            ours, theirs = (_spread(results, which, measured) for which in ("pretrained", kind))
            verdicts.append(compare(ours, theirs))
            row.append(f"{100 * (ours.mean - theirs.mean):+.1f} ({verdicts[-1]})")
        lines += [f"Against {name}: {tally(verdicts)}.", ""]
    return [
        *lines,
        *table(("method", "labels", *(f"MaPeT minus {name}" for name in BASELINES.values())), rows),
        "",
        "Points of accuracy. A difference up to the square root of the sum of the two squared deviations counts as"
        " within the spread; with few seeds that is a rule of thumb, not a test.",
    ]


def tally(verdicts: Sequence[Verdict]) -> str:
    """How often MaPeT is better, worse or neither, in words."""
    if "one seed" in verdicts:
        return "one seed gives no spread, so no claim is made"
    words = {"better": "better in", "worse": "worse in", "within the spread": "within the spread of the seeds in"}
    counts = ", ".join(f"{phrase} {verdicts.count(word)}" for word, phrase in words.items())
    return f"of {len(verdicts)} comparisons, MaPeT is {counts}"


def _loss_sentence(run: DemoRun) -> str:
    final, vocabulary = Spread.of(run.losses), run.recipe.model.vocabulary
    entropy = statistics.fmean(result.token_entropy for result in run.results)
    margin = 0.0 if math.isnan(final.deviation) else final.deviation
    spread = "" if math.isnan(final.deviation) else f" ± {final.deviation:.2f}"
    said = "no better than frequency alone; the network has not learned to use the image yet"
    if final.mean + margin < entropy:
        said = "the network uses what it sees of the image"
    elif final.mean - margin > entropy:
        said = "the network has not even learned how often each token occurs; it needs more steps"
    return (
        f"The loss ends at {final.mean:.2f}{spread} nats a token. A uniform guess over {vocabulary} tokens gives"
        f" {math.log(vocabulary):.2f}, a guess by token frequency {entropy:.2f}: {said}."
    )


def _spread(results: Sequence[SeedResult], kind: str, measured: tuple[str, str]) -> Spread:
    return Spread.of([getattr(result, kind).accuracy(*measured) for result in results])


def _measured(results: Sequence[SeedResult]) -> list[tuple[str, str]]:
    """Method and labels of every row."""
    return [(score.method, score.labels) for score in results[0].pretrained.scores]
