"""The demo's folder: where everything lies, what it was made with, and what is done already."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mapet import __version__
from mapet.config import to_dict
from mapet.demo.recipe import Recipe
from mapet.errors import ConfigError, DataError
from mapet.evaluate.frozen import EvaluationResult
from mapet.files import read_json, read_record, write_whole
from mapet.folders import LOCK

SETTINGS = "demo.json"
AGAIN = "delete it, and run the demo again"
SHOWN = 4


@dataclass(frozen=True)
class SeedResult:
    """What one seed gave."""

    seed: int
    pretrained: EvaluationResult
    random_init: EvaluationResult
    raw_pixels: EvaluationResult
    token_entropy: float
    """Of the training tokens, in nats."""


@dataclass(frozen=True)
class DemoFolder:
    """Paths and records of a demo."""

    root: Path

    def seed(self, seed: int) -> Path:
        """Everything of one seed: tokenizer, cache, run and scores."""
        return self.root / f"seed_{seed}"

    def metrics(self, seed: int) -> Path:
        """What pre-training logged."""
        return self.seed(seed) / "run" / "metrics.jsonl"

    def claim(self, recipe: Recipe, device: str) -> None:
        """Make the folder this recipe's, or find that it is; ConfigError where it holds anything else."""
        wanted = {"mapet": __version__, "torch": torch.__version__, "device": device, "recipe": to_dict(recipe)}
        path = self.root / SETTINGS
        if not path.is_file():
            if self.root.exists() and (not self.root.is_dir() or {path.name for path in self.root.iterdir()} - {LOCK}):
                raise ConfigError(f"{self.root} is no folder of a demo and is not empty: name another --output")
            write_json(path, wanted)
        found, wanted = _flat(read_json(path, advice=AGAIN)), _flat(wanted)
        names = [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]
        if names:
            shown = [f"{name}: {found.get(name)} instead of {wanted.get(name)}" for name in names[:SHOWN]]
            more = f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ConfigError(
                f"{self.root} holds a demo with other settings ({'; '.join(shown)}{more}): results are not mixed. "
                "Name another --output, or delete that folder"
            )

    def load_result(self, seed: int) -> SeedResult | None:
        """The result of a seed that is done; DataError where its file is damaged."""
        path = self.seed(seed) / "scores.json"
        advice = "delete it, and the demo measures this seed anew"
        return read_record(path, SeedResult, advice=advice) if path.is_file() else None

    def save_result(self, result: SeedResult) -> None:
        """Record that a seed is done."""
        write_json(self.seed(result.seed) / "scores.json", dataclasses.asdict(result))


class Timings:
    """Seconds of every stage, those of earlier calls of the same demo included. Kept in timings.json."""

    def __init__(self, folder: Path) -> None:
        self.path, self.seconds = folder / "timings.json", {}
        if self.path.is_file():
            self.seconds = read_record(self.path, dict[str, float], advice=AGAIN)

    @contextmanager
    def stage(self, name: str, *, anew: bool = False) -> Iterator[None]:
        """Time the block, also when it is interrupted; `anew` forgets the times before, of work that is done again."""
        began = time.perf_counter()
        try:
            yield
        finally:
            before = 0.0 if anew else self.seconds.get(name, 0.0)
            self.seconds[name] = before + time.perf_counter() - began
            write_json(self.path, self.seconds)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all. DataError where the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Values by dotted names."""
    if not isinstance(values, dict):
        return {name: values}
    parts = [_flat(below, f"{name}.{key}".lstrip(".")) for key, below in values.items()]
    return {key: value for part in parts for key, value in part.items()}
