"""Scores of frozen features: of images and a function from images to features, or of a checkpoint and its baselines.

The images are read whole, as centre squares of the model's size (the crops of a token cache as they are); BEiT's linear
evaluation enlarges them to 256 pixels and tests on the middle 224. Random views, where they are asked for, are cut from
those squares, not from the original images.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from mapet.checked import check_fields
from mapet.config import Count, CountOrNone, PositiveRate, Seed
from mapet.data.cache import TokenCache
from mapet.data.images import fingerprint_of, open_source
from mapet.data.manifest import MANIFEST
from mapet.errors import CheckpointError, ConfigError, DataError
from mapet.evaluate.features import Features, cached_features, extract_features, pixel_features
from mapet.evaluate.images import CacheImages, Images, RandomViews, SourceImages
from mapet.evaluate.knn import check_neighbours, knn_predict
from mapet.evaluate.labels import check_labels, check_same_classes, draw_per_class, split
from mapet.evaluate.probe import ProbeConfig, linear_probe, logistic_probe
from mapet.model.export import from_timm, to_timm
from mapet.model.timm_folder import is_timm_folder, read_timm_folder
from mapet.model.vit import MaskedTokenViT
from mapet.rng import seed_global_generators
from mapet.training.checkpoint import load_weights

FeatureFunction = Callable[[Images], Features]
Method = Literal["knn", "linear", "logistic"]
ALL_LABELS = "all"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on frozen features."""

    methods: tuple[Method, ...] = ("knn", "linear", "logistic")
    """In this order; logistic regression is for small sets, it takes all features at once."""
    neighbours: Count = 20
    temperature: PositiveRate = 0.07
    labels_per_class: CountOrNone = 10
    """Also measure with so many labels of every class, drawn by `seed`; 0 leaves that out."""
    augment_views: CountOrNone = 0
    """Train the linear probe on so many random crops of each image instead of its centre; needs the model, and time."""
    seed: Seed = 0
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        check_fields(self, "evaluation.")
        if not self.methods:
            raise ConfigError(f"evaluation.methods must be some of {', '.join(get_args(Method))}, got none")


@dataclass(frozen=True)
class Score:
    """One number of an evaluation."""

    method: str
    labels: str
    """Which training labels were used: "all", or "10 per class"."""
    accuracy: float
    """Top-1 on the test images, in [0, 1]."""
    note: str = ""


@dataclass(frozen=True)
class EvaluationResult:
    """Every score of one set of features."""

    scores: tuple[Score, ...]
    train_images: int
    test_images: int
    classes: int

    def accuracy(self, method: str, labels: str = ALL_LABELS) -> float:
        """The score of one method; KeyError when it was not measured."""
        for score in self.scores:
            if (score.method, score.labels) == (method, labels):
                return score.accuracy
        raise KeyError(f"no score {method!r} with {labels!r} labels")


def evaluate(
    features: VisionTransformer | FeatureFunction,
    train_images: Images,
    train_labels: np.ndarray | None,
    test_images: Images,
    test_labels: np.ndarray | None,
    *,
    config: EvaluationConfig | None = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> EvaluationResult:
    """Score features by kNN (k and 1), linear probe (best and last layer), logistic regression, or some of them.

    Args:
        features: a timm vision transformer, or a function from images to `Features` (`pixel_features` for the raw
            pixels, `cached_features` with its folder and model bound).
        train_images, test_images: disjoint, uint8 (n, 3, S, S); see `mapet.evaluate.images`.
        train_labels, test_labels: int64 (n,).
        classes: names, for error messages.
        device: where the probes run; the model's own by default, or the CPU.

    kNN and logistic regression read the last layer. Raises DataError when labels are missing, of one class, or fewer
    than `labels_per_class`; ConfigError when kNN asks for more neighbours than there are images.
    """
    config = config or EvaluationConfig()
    train_labels = check_labels(train_labels, len(train_images), "training", classes=classes)
    test_labels = check_labels(test_labels, len(test_images), "test", classes=classes)
    check_same_classes(train_labels, test_labels, classes=classes)
    subsets = {ALL_LABELS: np.arange(len(train_labels))}
    if config.labels_per_class:
        chosen = draw_per_class(train_labels, config.labels_per_class, seed=config.seed, classes=classes)
        subsets[f"{config.labels_per_class} per class"] = chosen
    if "knn" in config.methods:
        check_neighbours(config.neighbours, min(map(len, subsets.values())))
    extract = features
    if isinstance(features, torch.nn.Module):
        extract = functools.partial(extract_features, features)
        device = device or next(features.parameters()).device
    train, test = extract(train_images), extract(test_images)
    views = [extract(RandomViews(train_images, i, config.seed)) for i in range(config.augment_views)] or [train]
    scores = [
        Score(method, name, accuracy, note)
        for name, ids in subsets.items()
        for method, accuracy, note in _measured(
            [view.take(ids) for view in views],
            train.take(ids),
            train_labels[ids],
            test,
            test_labels,
            config,
            device or "cpu",
        )
    ]
    return EvaluationResult(tuple(scores), len(train), len(test), len(np.unique(train_labels)))


def _measured(
    views: Sequence[Features],
    train: Features,
    train_labels: np.ndarray,
    test: Features,
    test_labels: np.ndarray,
    config: EvaluationConfig,
    device: str | torch.device,
) -> list[tuple[str, float, str]]:
    """Name, accuracy and a note of each measure."""
    last = (train.layer(-1), train_labels, test.layer(-1), test_labels)
    scores = []
    for method in config.methods:
        if method == "knn":
            for k in (config.neighbours, 1):
                predicted = knn_predict(*last[:3], k=k, temperature=config.temperature, device=device)
                scores.append((f"kNN, k = {k}", float((predicted == test_labels).mean()), ""))
        elif method == "linear":
            probe = linear_probe(views, train_labels, test, test_labels, config=config.probe, device=device)
            scores.append(("linear probe, best layer", probe.best, probe.best_layer))
            scores.append(("linear probe, last layer", probe.last, probe.layers[-1]))
        else:
            scores.append(("logistic regression", logistic_probe(*last), ""))
    return scores


@dataclass(frozen=True)
class LabelledImages:
    """A labelled set; `view(ids)` are some of its images."""

    name: str
    labels: np.ndarray
    classes: Sequence[str]
    view: Callable[[np.ndarray], Images]


def open_labelled(spec: str, size: int) -> LabelledImages:
    """A labelled folder, built-in set or token cache.

    DataError where there are no labels, or for a folder of several parts of a set: a probe must not train on what it is
    tested on.
    """
    if (Path(spec) / MANIFEST).is_file():
        source = TokenCache.open(spec)
        view = functools.partial(CacheImages, source)
    else:
        source = open_source(spec)
        parts = getattr(source, "parts", ())
        if len(parts) > 1:
            train, test, *_ = (shlex.quote(str(Path(spec) / part)) for part in parts)
            raise DataError(
                f"{spec} holds the parts of a set ({', '.join(parts)}), which would be mixed: give "
                f"--images {train} --test-images {test}"
            )
        view = functools.partial(SourceImages, source, size)
    if source.labels is None or source.classes is None:
        raise DataError(
            f"{spec} has no labels, and a probe needs them: put the images of each class into a sub-folder of its own, "
            f"{spec}/CLASS/IMAGE, and no image beside them"
        )
    return LabelledImages(spec, source.labels, source.classes, view)


def probe_checkpoint(
    checkpoint: Path,
    images: str,
    test_images: str | None = None,
    *,
    test_fraction: float = 0.2,
    features: Path,
    config: EvaluationConfig,
    baselines: bool = False,
    ema: bool = False,
    batch_size: int = 256,
    device: torch.device,
) -> dict[str, EvaluationResult]:
    """Scores of a checkpoint's frozen features, and of its baselines where they are wanted, by name.

    Args:
        images, test_images: see `open_labelled`; without test images a part of the others is kept out of training.
        features: a folder, where features are kept and found again.
        baselines: also score the same network before training, and raw pixels.
        batch_size: images of a forward pass.
    """
    model = load_model(checkpoint, ema=ema).to(device)
    given = open_labelled(images, model.patch_embed.img_size[0])
    if test_images is None:
        test, test_labels = given, given.labels
        train_ids, test_ids = split(given.labels, test_fraction=test_fraction, seed=config.seed, classes=given.classes)
    else:
        test = open_labelled(test_images, model.patch_embed.img_size[0])
        test_labels = renumbered(test, given)
        train_ids, test_ids = np.arange(len(given.labels)), np.arange(len(test_labels))
    networks = {str(checkpoint): model}
    if baselines:
        networks["random initialisation"] = random_like(model, config.seed).to(device)
    layers = "all" if "linear" in config.methods else "last"
    kinds = {
        name: (kept_features(features, network, layers=layers, batch_size=batch_size), config)
        for name, network in networks.items()
    }
    if baselines:
        kinds["raw pixels"] = pixel_features, dataclasses.replace(config, augment_views=0)
    data = (given.view(train_ids), given.labels[train_ids], test.view(test_ids), test_labels[test_ids])
    return {
        name: evaluate(extract, *data, config=measured, classes=given.classes, device=device)
        for name, (extract, measured) in kinds.items()
    }


def load_model(path: Path, *, ema: bool = False) -> VisionTransformer:
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


def kept_features(folder: Path, model: VisionTransformer, **options: object) -> FeatureFunction:
    """Features of a model, computed once and then read from the folder."""

    def extract(images: Images) -> Features:
        return cached_features(folder, model, images, fingerprint=fingerprint_of(_described(images)), **options)

    return extract


def _described(images: Images) -> list[str]:
    """What tells images apart from others."""
    if isinstance(images, RandomViews):
        return [*_described(images.images), f"views by torchvision {images.view} {images.seed} {images.smallest_area}"]
    if isinstance(images, CacheImages):
        return [repr(images.cache.manifest.files), *map(str, images.ids)]
    return [images.source.fingerprint(), str(images.size), *map(str, images.ids)]


def renumbered(test: LabelledImages, images: LabelledImages) -> np.ndarray:
    """The test labels, by class name, in the numbers of the training images. DataError for a class unknown there."""
    number = {name: i for i, name in enumerate(images.classes)}
    if unknown := [name for name in test.classes if name not in number]:
        raise DataError(
            f"{test.name} has classes that {images.name} has not: {', '.join(unknown[:8])}; they are matched by name"
        )
    return np.array([number[name] for name in test.classes], dtype=np.int64)[test.labels]
