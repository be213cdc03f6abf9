"""A pre-training run small enough for tests: 40 images of 16 pixels, 16 tokens of a vocabulary of 32.

As a script it runs one configuration as the command line would: `tiny_run.py CACHE OUTPUT {"optim.clip": 1, ...}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mapet.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, change
from mapet.data.cache_writer import write_cache
from mapet.data.manifest import CacheDescription
from mapet.errors import MapetError
from mapet.objectives import options
from mapet.training.checkpoint import CheckpointStore, LoadedCheckpoint

IMAGES = 40
OBJECTIVE = {
    "mapet": {},
    "pim": {"objective.name": "pim"},
    "mim": {"objective.name": "mim", "objective.masked": 12},
}
"""What makes the tiny run one of each method."""


def make_cache(path: Path, *, images: int = IMAGES, seed: int = 0, vocabulary: int = 32) -> Path:
    """A cache of random pictures, whose tokens follow from the pixels so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (images, 3, 4, 4), generator=generator, dtype=torch.uint8)
    pixels = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    tokens = (coarse.long().sum(dim=1) * vocabulary // 766).flatten(1)
    description = CacheDescription(
        image_size=16,
        grid=4,
        vocabulary=vocabulary,
        tokenizer="test",
        tokenizer_fingerprint="0" * 64,
        source_fingerprint="0" * 64,
    )
    write_cache(path, description, pixels, tokens, [f"{i}.png" for i in range(images)])
    return path


def make_config(cache: Path, output: Path, **changes: Any) -> RunConfig:
    """The tiny run, 5 steps an epoch; `changes` are fields by dotted name, such as **{"optim.clip": 1.0}."""
    config = RunConfig(
        model=ModelConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, vocabulary=32, drop_path=0.3),
        objective=options("mapet", cut=5),
        data=DataConfig(cache=cache, workers=0),
        optim=OptimConfig(epochs=4, global_batch=8, warmup_epochs=1),
        train=TrainConfig(output=output, device="cpu", save_every=1000, log_every=1),
    )
    return change(config, changes)


def latest(store: CheckpointStore, config: RunConfig | None = None) -> LoadedCheckpoint | None:
    """The newest valid checkpoint, None where there is none."""
    step = store.newest_valid()
    return None if step is None else store.load(step, config)


def main(cache: str, output: str, changes: str = "{}") -> int:
    """Run it; the exit code that the command line gives."""
    from mapet.training.loop import pretrain

    torch.set_num_threads(1)
    try:
        return pretrain(make_config(Path(cache), Path(output), **json.loads(changes))).exit_code
    except MapetError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
