"""`mapet probe`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.models.vision_transformer import VisionTransformer

from mapet.commands.options import Probe
from mapet.data.cache import TokenCache
from mapet.data.images import ImageSource
from mapet.data.manifest import MANIFEST
from mapet.data.sources import open_source
from mapet.distributed import pick_device
from mapet.errors import CheckpointError, DataError
from mapet.evaluate import (
    CacheImages,
    EvaluationConfig,
    EvaluationResult,
    FeatureFunction,
    Features,
    Images,
    ProbeConfig,
    RandomViews,
    SourceImages,
    cached_features,
    evaluate,
    pixel_features,
    split,
)
from mapet.files import UnreadableFile, read_json, write_whole
from mapet.folders import check_place, locked
from mapet.model.export import from_timm, to_timm
from mapet.model.timm_folder import is_timm_folder, read_timm_folder
from mapet.model.vit import MaskedTokenViT
from mapet.rng import seed_global_generators
from mapet.training.checkpoint import load_weights
from mapet.words import in_line, say

SCORES = "scores.json"
KIND = "probe"


@dataclass(frozen=True)
class LabelledImages:
    """A labelled set: `view(ids)` are some of its images, `fingerprint` changes when the images do."""

    name: str
    labels: np.ndarray
    classes: Sequence[str]
    view: Callable[[np.ndarray], Images]
    fingerprint: str


def run(options: Probe) -> int:
    """Score the checkpoint, and the baselines if wanted; print a table and write scores.json."""
    check_place(options.output, KIND)
    check_ours(options.output)
    with locked(options.output, KIND):
        check_ours(options.output)
        for left in features_folder(options).glob(".features_*.partial"):  # of a killed process
            left.unlink(missing_ok=True)
        return measure(options)


def measure(options: Probe) -> int:
    """As `run`, in a folder that is this process's."""
    device = pick_device(options.device, None)
    model = load_model(options.checkpoint, ema=options.ema).to(device)
    images = open_labelled(options.images, model.patch_embed.img_size[0])
    test = open_labelled(options.test_images, model.patch_embed.img_size[0]) if options.test_images else None
    features = {str(options.checkpoint): frozen(options, model, images, test)}
    if options.baselines:
        features["random initialisation"] = frozen(options, random_like(model, options.seed).to(device), images, test)
        features["raw pixels"] = pixel_features
    results = {name: score(options, extract, images, test, device) for name, extract in features.items()}
    Console(width=None if sys.stdout.isatty() else 120).print(as_table(results))
    write_scores(options, results)
    say(f"scores: {options.output / SCORES}; frozen features: {features_folder(options)}")
    return 0


def load_model(path: Path, *, ema: bool) -> VisionTransformer:
    """The vision transformer in a run, a checkpoint or an exported folder. CheckpointError where there is none."""
    if not is_timm_folder(path):
        model, _, weights = load_weights(path, ema=ema)
        return to_timm(model, weights)
    if ema:
        raise CheckpointError(f"{path} is an exported model and has no moving average; leave out --ema")
    return read_timm_folder(path)


def random_like(model: VisionTransformer, seed: int) -> VisionTransformer:
    """The same network before any training."""
    config, _ = from_timm(model)
    seed_global_generators(seed)
    return to_timm(config, MaskedTokenViT(config).state_dict())


def open_labelled(spec: str, size: int) -> LabelledImages:
    """A labelled folder, built-in set or token cache. DataError where there are no labels."""
    if (Path(spec) / MANIFEST).is_file():
        cache = TokenCache.open(spec)
        labels, classes, view = cache.labels, cache.classes, lambda ids: CacheImages(cache, ids)
        fingerprint = fingerprint_of(cache.manifest.files)
    else:
        source = open_source(spec)
        check_one_part(spec, source)
        labels, classes, view = source.labels, source.classes, lambda ids: SourceImages(source, size, ids)
        fingerprint = source.fingerprint()
    if labels is None or classes is None:
        raise DataError(
            f"{spec} has no labels, and a probe needs them: put the images of each class into a sub-folder of its own, "
            f"{spec}/CLASS/IMAGE, and no image beside them"
        )
    return LabelledImages(spec, labels, classes, view, fingerprint)


def check_one_part(spec: str, source: ImageSource) -> None:
    """DataError for a folder of several parts of a set: a probe must not train on what it is tested on."""
    parts = getattr(source, "parts", ())
    if len(parts) > 1:
        train, test, *_ = (shlex.quote(str(Path(spec) / part)) for part in parts)
        raise DataError(
            f"{spec} holds the parts of a set ({', '.join(parts)}), which would be mixed: give "
            f"--images {train} --test-images {test}"
        )


def frozen(
    options: Probe, model: VisionTransformer, images: LabelledImages, test: LabelledImages | None
) -> FeatureFunction:
    """Features of the model, computed once and then read from the disk."""
    layers = "all" if "linear" in options.methods else "last"
    sets = fingerprint_of([images.fingerprint, test and test.fingerprint])

    def extract(which: Images) -> Features:
        key = fingerprint_of([sets, *describe(which)])
        return cached_features(
            features_folder(options),
            model,
            which,
            data_fingerprint=key,
            layers=layers,
            batch_size=options.batch_size,
        )

    return extract


def describe(images: Images) -> list[object]:
    """What tells images of the same sets apart."""
    if isinstance(images, RandomViews):
        return [*describe(images.images), "views", images.view, images.seed, images.smallest_area]
    return [type(images).__name__, getattr(images, "size", None), images.ids.tolist()]


def fingerprint_of(value: object) -> str:
    """SHA-256 of a value that JSON can hold; dataclasses in it become dicts."""
    text = json.dumps(value, default=dataclasses.asdict, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def score(
    options: Probe,
    extract: FeatureFunction,
    images: LabelledImages,
    test: LabelledImages | None,
    device: torch.device,
) -> EvaluationResult:
    """All scores of one kind of features, on the test set or on a part of the images that is kept out of training."""
    config = EvaluationConfig(
        methods=options.methods,
        neighbours=options.neighbours,
        labels_per_class=options.labels_per_class,
        augment_views=options.views if extract is not pixel_features else 0,
        seed=options.seed,
        probe=ProbeConfig(epochs=options.epochs, batch=options.batch, lr=options.lr, seed=options.seed),
    )
    if test is None:
        train_ids, test_ids = split(
            images.labels, test_fraction=options.test_fraction, seed=options.seed, classes=images.classes
        )
        test, test_labels = images, images.labels
    else:
        train_ids, test_ids = np.arange(len(images.labels)), np.arange(len(test.labels))
        test_labels = renumbered(test, images)
    return evaluate(
        extract,
        images.view(train_ids),
        images.labels[train_ids],
        test.view(test_ids),
        test_labels[test_ids],
        config=config,
        classes=images.classes,
        device=device,
    )


def renumbered(test: LabelledImages, images: LabelledImages) -> np.ndarray:
    """The test labels, by class name, in the numbers of the training images. DataError for a class unknown there."""
    number = {name: i for i, name in enumerate(images.classes)}
    if unknown := [name for name in test.classes if name not in number]:
        raise DataError(
            f"{test.name} has classes that {images.name} has not: {', '.join(unknown[:8])}; they are matched by name"
        )
    return np.array([number[name] for name in test.classes], dtype=np.int64)[test.labels]


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


def write_scores(options: Probe, results: dict[str, EvaluationResult]) -> None:
    """scores.json, whole or not at all. DataError where the disk does not take it."""
    path = options.output / SCORES
    content = {
        "options": dataclasses.asdict(options),
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2, default=str) + "\n")
    except OSError as error:
        raise DataError(f"could not write {path}: {error.strerror or error}") from error


def check_ours(output: Path) -> None:
    """DataError where the folder has a file of another origin under a name of ours."""
    try:
        values = read_json(output / SCORES)
    except UnreadableFile as error:
        values = {"options": {}, "results": {}} if error.missing else None
    if not isinstance(values, dict) or set(values) != {"options", "results"}:
        raise DataError(f"{output / SCORES} was not written by mapet probe, so it stays: name another --output")


def features_folder(options: Probe) -> Path:
    """Where the frozen features are kept."""
    return options.output / "features"
