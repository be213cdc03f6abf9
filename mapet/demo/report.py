"""The written report of the demo: every number with its spread, and sentences that follow from the numbers alone."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mapet.errors import DataError
from mapet.evaluate import EvaluationResult
from mapet.files import write_whole
from mapet.model.export import ExportReport
from mapet.report.markdown import table
from mapet.words import in_line, printable

Verdict = Literal["better", "worse", "within the spread", "one seed"]


@dataclass(frozen=True)
class Picture:
    """A picture beside the report, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class PretrainingLoss:
    """The end of pre-training beside what guessing would give, in nats a token."""

    final: tuple[float, ...]
    """One per seed."""
    vocabulary: int
    token_entropy: float
    """`mapet.report.loss_curve.unigram_entropy` of the training tokens."""


@dataclass(frozen=True)
class DemoResults:
    """All that the report tells."""

    command: str
    facts: tuple[tuple[str, str], ...]
    """What was run: (name, value) in the order to print."""
    seeds: tuple[int, ...]
    pretrained: tuple[EvaluationResult, ...]
    """One per seed, as the next two."""
    random_init: tuple[EvaluationResult, ...]
    raw_pixels: tuple[EvaluationResult, ...]
    loss: PretrainingLoss
    timings: tuple[tuple[str, float], ...]
    """(stage, seconds) in order."""
    machine: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()
    export: ExportReport | None = None

    def __post_init__(self) -> None:
        for name in ("pretrained", "random_init", "raw_pixels"):
            if len(getattr(self, name)) != len(self.seeds):
                raise ValueError(f"{name} has {len(getattr(self, name))} results for {len(self.seeds)} seeds")
        if not self.seeds:
            raise ValueError("a report needs the results of at least one seed")


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
    difference = a.mean - b.mean
    if abs(difference) <= math.hypot(a.deviation, b.deviation):
        return "within the spread"
    return "better" if difference > 0 else "worse"


def write_report(path: str | Path, results: DemoResults) -> Path:
    """Write report.md, whole or not at all. Raises DataError when it cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, printable(render(results, path.parent)))
    except OSError as error:
        raise DataError(f"could not write the report {path}: {error}") from error
    return path


def render(results: DemoResults, folder: Path) -> str:
    """The report as Markdown, for a file in `folder`."""
    sections = [
        ["# MaPeT demo", "", f"Made by `{in_line(results.command)}`."],
        ["## What was run", "", *table(("", ""), results.facts)],
        ["## Top-1 accuracy on the test images", "", *_accuracy_section(results)],
        ["## What the numbers say", "", *_comparison_section(results)],
        ["## Pre-training", "", _loss_sentence(results.loss)],
        *([f"![{p.path.stem}]({_relative(p.path, folder)})", "", p.caption] for p in results.pictures),
        ["## The exported model", "", *_export_section(results.export, folder)],
        [
            "## Time",
            "",
            *table(("stage", "seconds"), _timing_rows(results.timings)),
        ],
        ["## Machine", "", *(f"- {line}" for line in results.machine)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _accuracy_section(results: DemoResults) -> list[str]:
    first = results.pretrained[0]
    seeds = ", ".join(str(seed) for seed in results.seeds)
    spread = "mean ± standard deviation" if len(results.seeds) > 1 else "no spread, for there is one seed"
    rows = [
        (method, labels, *(_spread(runs, method, labels).percent() for runs in _groups(results)))
        for method, labels in _measured(results)
    ]
    return [
        f"Percent; {spread}, over seeds {seeds}. {first.train_images} training images, {first.test_images} test images,"
        f" {first.classes} classes (chance: {100 / first.classes:.1f} %).",
        "",
        *table(("method", "labels", "MaPeT pre-training", "random initialisation", "raw pixels"), rows),
        "",
        "Features are frozen. kNN and logistic regression read the last block. The linear probe trains a classifier on"
        ' every block; "best layer" picks block and epoch by their accuracy on the test images, as BEiT does,'
        ' and is therefore optimistic; "last layer" picks nothing.',
    ]


def _comparison_section(results: DemoResults) -> list[str]:
    """Tallies and a table of differences: MaPeT against both baselines."""
    baselines = {"the same network at random initialisation": results.random_init, "raw pixels": results.raw_pixels}
    cells: list[list[str]] = [[method, labels] for method, labels in _measured(results)]
    lines = []
    for name, runs in baselines.items():
        verdicts = []
        for cell, (method, labels) in zip(cells, _measured(results), strict=True):
            ours, theirs = _spread(results.pretrained, method, labels), _spread(runs, method, labels)
            verdicts.append(compare(ours, theirs))
            cell.append(f"{100 * (ours.mean - theirs.mean):+.1f} ({verdicts[-1]})")
        lines += [f"Against {name}: {tally(verdicts)}.", ""]
    return [
        *lines,
        *table(("method", "labels", *(f"MaPeT minus {name}" for name in baselines)), cells),
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


def _loss_sentence(loss: PretrainingLoss) -> str:
    final, uniform = Spread.of(loss.final), math.log(loss.vocabulary)
    spread = "" if math.isnan(final.deviation) else f" ± {final.deviation:.2f}"
    start = (
        f"The loss ends at {final.mean:.2f}{spread} nats a token. A uniform guess over {loss.vocabulary} tokens gives"
        f" {uniform:.2f}, a guess by token frequency {loss.token_entropy:.2f}: "
    )
    margin = 0.0 if math.isnan(final.deviation) else final.deviation
    if final.mean + margin < loss.token_entropy:
        return start + "the network uses what it sees of the image."
    if final.mean - margin > loss.token_entropy:
        return start + "the network has not even learned how often each token occurs; it needs more steps."
    return start + "no better than frequency alone; the network has not learned to use the image yet."


def _export_section(export: ExportReport | None, folder: Path) -> list[str]:
    if export is None:
        return ["No model was exported."]
    return [
        f"`{_relative(export.folder, folder)}` holds a timm vision transformer of {export.parameters:,} parameters."
        f" Its features are those of the pre-training model, to {export.largest_difference:.1e} of the largest one.",
        "",
        "```python",
        "import timm",
        "",
        f"model = {export.load_line}",
        "```",
    ]


def _groups(results: DemoResults) -> tuple[tuple[EvaluationResult, ...], ...]:
    return results.pretrained, results.random_init, results.raw_pixels


def _spread(runs: Sequence[EvaluationResult], method: str, labels: str) -> Spread:
    return Spread.of([run.accuracy(method, labels) for run in runs])


def _measured(results: DemoResults) -> list[tuple[str, str]]:
    """Method and labels of every row."""
    return [(score.method, score.labels) for score in results.pretrained[0].scores]


def _timing_rows(timings: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    total = sum(seconds for _, seconds in timings)
    return [(stage, f"{seconds:.1f}") for stage, seconds in [*timings, ("all", total)]]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
