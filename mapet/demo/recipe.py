"""What the demo runs: sizes that learn something from 1,437 small digits in about a minute on one core."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mapet.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mapet.evaluate.frozen import EvaluationConfig
from mapet.evaluate.probe import ProbeConfig
from mapet.objectives import options


@dataclass(frozen=True)
class Recipe:
    """Sizes of the demo; results in one folder all come from one recipe."""

    digits: int
    """The first so many digits."""
    model: ModelConfig
    cut: int
    color_jitter: float
    optim: OptimConfig
    save_every: int
    log_every: int
    labels_per_class: int
    probe: ProbeConfig
    photo_size: int
    """Of the photographs, whose patches of 16 pixels get a tokenizer for its picture only,"""
    photo_vocabulary: int
    """with so many entries."""

    def run(self, seed: int, cache: Path, output: Path, device: str) -> RunConfig:
        """One pre-training run."""
        return RunConfig(
            model=self.model,
            objective=options("mapet", cut=self.cut),
            data=DataConfig(cache, workers=0, color_jitter=self.color_jitter),
            optim=self.optim,
            train=TrainConfig(
                output=output, seed=seed, device=device, keep=1, save_every=self.save_every, log_every=self.log_every
            ),
        )

    def evaluation(self, seed: int) -> EvaluationConfig:
        """What is measured; the seed draws the few labels."""
        return EvaluationConfig(labels_per_class=self.labels_per_class, seed=seed, probe=self.probe)


FULL = Recipe(
    digits=1797,
    # An image is 3 x 3 patches: a patch is a piece of a stroke, and cannot be told from the rim of its neighbours, as
    # the patches of finer grids can where 8 x 8 pixels are enlarged. The paper's layer scale of 0.1 is for deeper
    # networks and longer runs, and its colour jitter of 0.4 for photographs: here they cost accuracy.
    model=ModelConfig(image_size=24, patch_size=8, vocabulary=128, width=64, depth=4, heads=2, layer_scale=1.0),
    cut=3,
    color_jitter=0.0,
    optim=OptimConfig(epochs=40, global_batch=32, lr=4e-3, warmup_epochs=4),
    save_every=400,
    log_every=40,
    labels_per_class=10,
    probe=ProbeConfig(batch=32),  # the paper's 1024 is one or two steps an epoch on so few images
    photo_size=512,
    photo_vocabulary=256,
)
QUICK = replace(
    FULL,
    digits=240,
    model=replace(FULL.model, vocabulary=32, width=16, depth=2),
    optim=replace(FULL.optim, epochs=1, warmup_epochs=0),
    save_every=4,
    log_every=2,
    probe=ProbeConfig(epochs=2, batch=32),
    photo_size=128,
    photo_vocabulary=32,
)
"""Runs everything in seconds; its numbers mean nothing."""
