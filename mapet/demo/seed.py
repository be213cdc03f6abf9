"""One seed of the demo: split, tokenizer, tokens, pre-training and scores. Only the scores see the test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mapet.config import RunConfig
from mapet.data.cache import TokenCache
from mapet.data.images import ImageSource, Subset
from mapet.demo.folder import DemoFolder, SeedResult, Timings, write_json
from mapet.demo.recipe import Recipe
from mapet.evaluate import CacheImages, EvaluationResult, FeatureFunction, SourceImages, evaluate, pixel_features, split
from mapet.model.export import to_timm
from mapet.model.official_names import StateDict
from mapet.objectives import build_objective
from mapet.report.loss_curve import unigram_entropy
from mapet.rng import seed_global_generators
from mapet.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from mapet.tokenizers.encode import tokenize
from mapet.tokenizers.fitting.fit import FitConfig, fit_tokenizer
from mapet.tokenizers.store import MANIFEST
from mapet.training.checkpoint import load_weights
from mapet.training.loop import pretrain


class Stopped(Exception):
    """Pre-training ended early on a signal, with a checkpoint."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True)
class SeedJob:
    """What one seed needs, and where it puts things."""

    seed: int
    recipe: Recipe
    folder: DemoFolder
    device: str
    timings: Timings

    @property
    def place(self) -> Path:
        return self.folder.seed(self.seed)

    @property
    def config(self) -> RunConfig:
        """Of the pre-training."""
        return self.recipe.run(self.seed, self.place / "cache", self.place / "run", self.device)

    def run(self, digits: ImageSource) -> SeedResult:
        """Do what is not done yet. Stopped when a signal ends pre-training."""
        train, test = self.split(digits)
        with self.timings.stage("fit the tokenizers, tokenise"):
            self.tokens(train)
        with self.timings.stage("pre-train"):
            self.pretrain()
        with self.timings.stage("evaluate"):
            result = self.measure(test)
        self.folder.save_result(result)
        return result

    def split(self, digits: ImageSource) -> tuple[Subset, Subset]:
        """Training and test images, class by class; their names go to split.json."""
        ids = split(digits.labels, seed=self.seed, classes=digits.classes)
        train, test = (Subset(digits, part) for part in ids)
        write_json(self.place / "split.json", {"train": train.names, "test": test.names})
        return train, test

    def tokens(self, train: ImageSource) -> None:
        """Fit a tokenizer on the training images and fill their cache, unless both are there."""
        recipe = self.recipe
        fresh = make_tokenizer(
            "pixel", image_size=recipe.image_size, patch_size=recipe.patch_size, vocabulary=recipe.vocabulary
        )
        tokenizer = fitted(self.place / "tokenizer", fresh, train, seed=self.seed)
        tokenize(train, tokenizer, self.config.data.cache, image_size=recipe.image_size, workers=0)

    def pretrain(self) -> None:
        """Pre-train, from the newest checkpoint if there is one."""
        result = pretrain(self.config)
        if result.signal:
            raise Stopped(result.exit_code)

    def measure(self, test: ImageSource) -> SeedResult:
        """Score the pre-trained network, itself before training, and the pixels, on the same images and labels."""
        cache = TokenCache.open(self.config.data.cache)
        weights = load_weights(self.config.train.output)[2]
        return SeedResult(
            seed=self.seed,
            pretrained=self.score(self.network(weights), cache, test),
            random_init=self.score(self.network(initial_weights(self.config)), cache, test),
            raw_pixels=self.score(pixel_features, cache, test),
            token_entropy=unigram_entropy(cache.tokens(np.arange(len(cache)))),
        )

    def network(self, weights: StateDict) -> torch.nn.Module:
        """The timm vision transformer of some weights, on the demo's device."""
        return to_timm(self.recipe.model(), weights).to(self.device)

    def score(
        self, features: torch.nn.Module | FeatureFunction, cache: TokenCache, test: ImageSource
    ) -> EvaluationResult:
        """kNN and linear probes of features, the training images from the cache."""
        return evaluate(
            features,
            CacheImages(cache, np.arange(len(cache))),
            cache.labels,
            SourceImages(test, self.recipe.image_size, np.arange(len(test))),
            test.labels,
            config=self.recipe.evaluation(self.seed),
            classes=test.classes,
            device=self.device,
        )


def fitted(folder: Path, fresh: Tokenizer, images: ImageSource, *, seed: int) -> Tokenizer:
    """The tokenizer saved in the folder; where there is none, `fresh` is fitted and saved."""
    if (folder / MANIFEST).is_file():
        return load_tokenizer(folder)
    fit_tokenizer(fresh, images, folder, FitConfig(seed=seed, redos=1), workers=0)
    return fresh


def initial_weights(config: RunConfig) -> StateDict:
    """The very weights that pre-training with this configuration starts from."""
    with torch.random.fork_rng(devices=[]):
        seed_global_generators(config.train.seed)
        return build_objective(config.objective, config.model).model.state_dict()
