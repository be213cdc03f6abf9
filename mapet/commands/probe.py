"""`mapet probe`. Images are tested whole, as centre squares; BEiT tests on the middle 224 of 256 pixels."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mapet.commands.options import Probe
from mapet.distributed import pick_device
from mapet.errors import DataError
from mapet.evaluate.frozen import EvaluationConfig, EvaluationResult, probe_checkpoint
from mapet.evaluate.probe import ProbeConfig
from mapet.files import UnreadableFile, read_json, write_whole
from mapet.folders import check_place, locked
from mapet.words import in_line, say

SCORES = "scores.json"
KIND = "probe"


def run(options: Probe) -> int:
    """Score the checkpoint, and the baselines if wanted; print a table and write scores.json."""
    scores, features = options.output / SCORES, options.output / "features"
    check_place(options.output, KIND)
    check_ours(scores)
    with locked(options.output, KIND):
        check_ours(scores)
        for left in features.glob(".features_*.partial"):  # of a killed process
            left.unlink(missing_ok=True)
        results = probe_checkpoint(
            options.checkpoint,
            options.images,
            options.test_images,
            test_fraction=options.test_fraction,
            features=features,
            config=EvaluationConfig(
                methods=options.methods,
                neighbours=options.neighbours,
                labels_per_class=options.labels_per_class,
                augment_views=options.views,
                seed=options.seed,
                probe=ProbeConfig(epochs=options.epochs, batch=options.batch, lr=options.lr, seed=options.seed),
            ),
            baselines=options.baselines,
            ema=options.ema,
            batch_size=options.batch_size,
            device=pick_device(options.device, None),
        )
        Console(width=None if sys.stdout.isatty() else 120).print(as_table(results))
        write_scores(scores, options, results)
        say(f"scores: {scores}; frozen features: {features}")
    return 0


def as_table(results: dict[str, EvaluationResult]) -> Table:
    """Top-1 accuracy in percent, a column for each kind of features."""
    first = next(iter(results.values()))
    sizes = f"{first.train_images} training images, {first.test_images} test images, {first.classes} classes"
    table = Table("method", "labels", title=f"top-1 in percent: {sizes}", title_justify="left", show_edge=False)
    for name in results:
        table.add_column(Text(in_line(name)), justify="right", overflow="fold")
    for row in zip(*(result.scores for result in results.values()), strict=True):
        cells = [f"{100 * one.accuracy:.1f}" + (f" ({one.note})" if "best" in one.method else "") for one in row]
        table.add_row(row[0].method, row[0].labels, *cells)
    return table


def write_scores(path: Path, options: Probe, results: dict[str, EvaluationResult]) -> None:
    """scores.json, whole or not at all. DataError where the disk does not take it."""
    content = {
        "options": dataclasses.asdict(options),
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2, default=str) + "\n")
    except OSError as error:
        raise DataError(f"could not write {path}: {error.strerror or error}") from error


def check_ours(path: Path) -> None:
    """DataError where a file of another origin has the name of ours."""
    try:
        values = read_json(path)
    except UnreadableFile as error:
        values = {"options": {}, "results": {}} if error.missing else None
    if not isinstance(values, dict) or set(values) != {"options", "results"}:
        raise DataError(f"{path} was not written by mapet probe, so it stays: name another --output")
