"""One seed of the demo: split, tokenizer, tokens, pre-training and scores. Only the scores see the test images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from mapet.config import RunConfig
from mapet.data.cache import TokenCache
from mapet.data.images import ImageSource, Squares, Subset
from mapet.demo.folder import DemoFolder, SeedResult, Timings
from mapet.demo.recipe import Recipe
from mapet.evaluate.features import pixel_features
from mapet.evaluate.frozen import evaluate
from mapet.evaluate.labels import split
from mapet.files import write_json
from mapet.model.export import to_timm
from mapet.model.official_names import StateDict
from mapet.objectives import build_task
from mapet.rng import seed_global_generators
from mapet.tokenizers import load_tokenizer, make_tokenizer
from mapet.tokenizers.encode import tokenize
from mapet.tokenizers.fitting.fit import FitConfig, fit_tokenizer
from mapet.tokenizers.kmeans import KMeansTokenizer
from mapet.tokenizers.store import MANIFEST
from mapet.tokenizers.usage import count_usage
from mapet.training.checkpoint import load_weights
from mapet.training.loop import pretrain

INTERRUPTED = 130


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
        """Do what is not done yet. A signal during pre-training ends the process as the signal would."""
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
        model = self.recipe.model
        tokenizer = fitted(
            self.place / "tokenizer", train, model.image_size, model.patch_size, model.vocabulary, self.seed
        )
        tokenize(train, tokenizer, self.config.data.cache, image_size=model.image_size, workers=0)

    def pretrain(self) -> None:
        """Pre-train, from the newest checkpoint if there is one."""
        result = pretrain(self.config)
        if result.signal and result.exit_code == INTERRUPTED:
            raise KeyboardInterrupt("stopped by Ctrl-C; the same command goes on from the last checkpoint")
        if result.signal:
            raise SystemExit(result.exit_code)

    def measure(self, test: ImageSource) -> SeedResult:
        """Score the pre-trained network, itself before training, and the pixels, on the same images and labels."""
        cache, size = TokenCache.open(self.config.data.cache), self.recipe.model.image_size
        _, _, weights = load_weights(self.config.train.output)
        networks = [to_timm(self.recipe.model, w).to(self.device) for w in (weights, initial_weights(self.config))]
        train_images = cache
        test_images = Squares(test, size)
        options = {"config": self.recipe.evaluation(self.seed), "classes": test.classes, "device": self.device}
        scores = [
            evaluate(features, train_images, cache.labels, test_images, test.labels, **options)
            for features in (*networks, pixel_features)
        ]
        return SeedResult(self.seed, *scores, token_entropy=math.log(count_usage(cache).perplexity))


def fitted(
    folder: Path, images: ImageSource, image_size: int, patch_size: int, vocabulary: int, seed: int
) -> KMeansTokenizer:
    """The k-means tokenizer of pixels saved in the folder; where there is none, it is fitted and saved."""
    if not (folder / MANIFEST).is_file():
        fresh = make_tokenizer("pixel", image_size=image_size, patch_size=patch_size, vocabulary=vocabulary)
        fit_tokenizer(fresh, images, folder, FitConfig(seed=seed, redos=1), workers=0)
    return load_tokenizer(folder)


def initial_weights(config: RunConfig) -> StateDict:
    """The very weights that pre-training with this configuration starts from."""
    with torch.random.fork_rng(devices=[]):
        seed_global_generators(config.train.seed)
        return build_task(config).backbone()[1]
