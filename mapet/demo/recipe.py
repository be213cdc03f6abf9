"""What the demo runs: sizes that learn something from 1,437 small digits in about a minute on one core."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mapet.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mapet.evaluate import EvaluationConfig, ProbeConfig
from mapet.objectives import options


@dataclass(frozen=True)
class PhotoRecipe:
    """The tokenizer of the photographs' centre squares, made for its picture only."""

    image_size: int = 512
    patch_size: int = 16
    vocabulary: int = 256


@dataclass(frozen=True)
class Recipe:
    """Sizes of the demo; results in one folder all come from one recipe.

    An image is 3 x 3 patches: a patch is a piece of a stroke, and cannot be told from the rim of its neighbours, as the
    patches of finer grids can where 8 x 8 pixels are enlarged.
    """

    digits: int = 1797
    """The first so many digits."""
    image_size: int = 24
    patch_size: int = 8
    vocabulary: int = 128
    width: int = 64
    depth: int = 4
    heads: int = 2
    layer_scale: float = 1.0
    """The paper's 0.1 is for deeper networks and longer runs: here it hinders learning."""
    cut: int = 3
    epochs: int = 40
    warmup_epochs: int = 4
    global_batch: int = 32
    lr: float = 4e-3
    color_jitter: float = 0.0
    """The paper's 0.4 is for photographs; on grey digits it costs accuracy."""
    save_every: int = 400
    log_every: int = 40
    labels_per_class: int = 10
    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(batch=32))
    """The paper's batch of 1024 is one or two steps an epoch on so few images, too few to fit anything."""
    photos: PhotoRecipe = field(default_factory=PhotoRecipe)

    def model(self) -> ModelConfig:
        """The network."""
        return ModelConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            layer_scale=self.layer_scale,
            vocabulary=self.vocabulary,
        )

    def run(self, seed: int, cache: Path, output: Path, device: str) -> RunConfig:
        """One pre-training run."""
        return RunConfig(
            model=self.model(),
            objective=options("mapet", cut=self.cut),
            data=DataConfig(cache, workers=0, color_jitter=self.color_jitter),
            optim=OptimConfig(
                epochs=self.epochs, global_batch=self.global_batch, lr=self.lr, warmup_epochs=self.warmup_epochs
            ),
            train=TrainConfig(
                output=output,
                seed=seed,
                device=device,
                save_every=self.save_every,
                keep=1,
                log_every=self.log_every,
            ),
        )

    def evaluation(self, seed: int) -> EvaluationConfig:
        """What is measured; the seed draws the few labels."""
        return EvaluationConfig(labels_per_class=self.labels_per_class, seed=seed, probe=self.probe)


FULL = Recipe()
QUICK = Recipe(
    digits=240,
    vocabulary=32,
    width=16,
    depth=2,
    epochs=1,
    warmup_epochs=0,
    save_every=4,
    log_every=2,
    probe=ProbeConfig(epochs=2, batch=32),
    photos=PhotoRecipe(image_size=128, vocabulary=32),
)
"""Runs everything in seconds; its numbers mean nothing."""
