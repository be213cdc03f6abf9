"""How good are frozen features? kNN and linear probes on a labelled set, with all labels and with a few per class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from mapet.checked import check_fields
from mapet.config import Count, CountOrNone, PositiveRate, Seed
from mapet.errors import ConfigError
from mapet.evaluate.features import Features, cached_features, extract_features, pixel_features
from mapet.evaluate.images import CacheImages, Images, RandomViews, SourceImages
from mapet.evaluate.knn import check_neighbours, knn_accuracy, knn_predict
from mapet.evaluate.labels import check_labels, check_same_classes, draw_per_class, split
from mapet.evaluate.probe import LinearProbeResult, ProbeConfig, linear_probe, logistic_probe

__all__ = [
    "CacheImages",
    "EvaluationConfig",
    "EvaluationResult",
    "FeatureFunction",
    "Features",
    "Images",
    "LinearProbeResult",
    "Method",
    "ProbeConfig",
    "RandomViews",
    "Score",
    "SourceImages",
    "cached_features",
    "draw_per_class",
    "evaluate",
    "extract_features",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "logistic_probe",
    "pixel_features",
    "split",
]

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
    if device is None:
        device = next(features.parameters()).device if isinstance(features, torch.nn.Module) else "cpu"
    extract = functools.partial(extract_features, features) if isinstance(features, torch.nn.Module) else features
    train, test = extract(train_images), extract(test_images)
    views = [extract(RandomViews(train_images, i, config.seed)) for i in range(config.augment_views)] or [train]
    scores: list[Score] = []
    for name, ids in subsets.items():
        data = (train.take(ids), train_labels[ids], test, test_labels)
        scores += _scores(name, data, [view.take(ids) for view in views], config, device)
    return EvaluationResult(tuple(scores), len(train), len(test), len(np.unique(train_labels)))


def _scores(
    labels: str,
    data: tuple[Features, np.ndarray, Features, np.ndarray],
    views: Sequence[Features],
    config: EvaluationConfig,
    device: str | torch.device,
) -> list[Score]:
    train, train_labels, test, test_labels = data
    last = (train.layer(-1), train_labels, test.layer(-1), test_labels)
    scores = []
    for method in config.methods:
        if method == "knn":
            for k in (config.neighbours, 1):
                accuracy = knn_accuracy(*last, k=k, temperature=config.temperature, device=device)
                scores.append(Score(f"kNN, k = {k}", labels, accuracy))
        elif method == "linear":
            probe = linear_probe(views, train_labels, test, test_labels, config=config.probe, device=device)
            scores.append(Score("linear probe, best layer", labels, probe.best, probe.best_layer))
            scores.append(Score("linear probe, last layer", labels, probe.last, probe.layers[-1]))
        else:
            scores.append(Score("logistic regression", labels, logistic_probe(*last)))
    return scores
