"""Where the numbers of a run go: metrics.jsonl and TensorBoard always, W&B or trackio on request."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from mapet.checked import at_least, conform
from mapet.errors import ConfigError, DataError, MapetError
from mapet.files import read_bytes, write_whole

FILE_NAME, BOARD = "metrics.jsonl", "tensorboard"
PROJECT = "mapet"
NO_CURVE = ("step", "eta_seconds")
NUMBERS = {"loss", "accuracy", "lr", "val_loss", "val_accuracy"}
"""What a curve is drawn of."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of the log."""

    step: int
    """Optimizer steps done."""
    epoch: float
    """Epochs done."""
    loss: float
    """Mean over the global batches since the line before."""
    metrics: dict[str, float]
    """What the method logs besides, over the last global batch: the accuracy, the share of predicted tokens that are
    right, 0 to 1. After an epoch, loss and these over the held-out images too: `val_loss`, `val_accuracy`. Each is an
    entry of the line by its own name."""
    lr: float
    """Learning rate of the last step."""
    gradient_norm: float
    """Of the last step, before clipping."""
    images_per_second: float
    """Over all processes, waiting for data included."""
    data_wait: float
    """Share of the time spent waiting for data, 0 to 1."""
    eta_seconds: float
    """Time left at this rate."""
    loss_scale: float = 1.0
    """Factor on the loss, fp16 only."""


class Best:
    """The smallest value seen, with its step. A value that is not finite is never the best."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.value: float | None = None

    def consider(self, step: int, value: float | None) -> bool:
        """Take `value` if it is finite and smaller than all before it; whether it was taken. None counts as NaN."""
        if value is None or not math.isfinite(value) or (self.value is not None and value >= self.value):
            return False
        self.step, self.value = step, value
        return True


class MetricsLog:
    """Writes StepMetrics to every place. Lines of a resumed run that lie after its checkpoint are dropped first.

    `start` is the step the run resumes from, 0 for a fresh one. ConfigError when a tracker is not installed; MapetError
    when the folder cannot be written in the beginning. Later that is a warning: it is the checkpoints that count.
    """

    def __init__(self, folder: Path, start: int, trackers: tuple[str, ...] = (), config: dict | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the main process logs

        modules = import_trackers(trackers)
        self.folder, self.best_loss, self._failed = folder, Best(), set()
        self.validated: set[int] = set()  # steps before `start` after which the run was judged on held-out images
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for line in keep_until(folder / FILE_NAME, start):
                self.best_loss.consider(line["step"], line.get("loss"))
                if "val_loss" in line:
                    self.validated.add(line["step"])
            self._file = (folder / FILE_NAME).open("a", encoding="utf-8")
            try:
                self._board = SummaryWriter(str(folder / BOARD), purge_step=start + 1)
            except UnicodeError:
                self._board = None
                warnings.warn(f"TensorBoard writes to no folder whose name is not UTF-8, {folder}", stacklevel=2)
        except OSError as error:
            raise MapetError(f"cannot write the metrics of the run in {folder}: {error.strerror or error}") from error
        self._trackers = [_start(module, folder, config or {}) for module in modules]

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._dispensable(FILE_NAME):
            self._file.close()
        if self._board:
            with self._dispensable(BOARD):
                self._board.close()
        for tracker in self._trackers:
            tracker.finish()

    def write(self, metrics: StepMetrics) -> None:
        """Append one line and flush it; values that are not finite become null, for JSON has no NaN."""
        values = dataclasses.asdict(metrics)
        values |= values.pop("metrics")
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.best_loss.consider(metrics.step, metrics.loss)
        curves = {name: value for name, value in values.items() if name not in NO_CURVE and value is not None}
        with self._dispensable(FILE_NAME):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._board:
            with self._dispensable(BOARD):
                for name, value in curves.items():
                    self._board.add_scalar(name, value, metrics.step)
        for tracker in self._trackers:
            tracker.log(curves, step=metrics.step)

    @contextmanager
    def _dispensable(self, name: str) -> Iterator[None]:
        """Turn what the disk refuses into a warning, once for each name."""
        try:
            yield
        except OSError as error:
            if name not in self._failed:
                warnings.warn(
                    f"cannot write {self.folder / name}: {error.strerror or error}; the run goes on without",
                    stacklevel=4,
                )
            self._failed.add(name)


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop from a metrics file the lines after `step`, and damaged ones, which are warned of; the lines that stay."""
    if not os.path.lexists(path):
        return []
    kept = [line for line in read_lines(path) if line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def check_ours(path: Path) -> None:
    """DataError where a metrics file is there, and holds no line of a run."""
    if os.path.lexists(path) and (content := read_bytes(path)) and not any(map(_line, content.split(b"\n"))):
        raise DataError(f"{path} holds no line of a run; it is left as it is: move it away, or give another folder")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file that are whole: `step` is there, and what else is in NUMBERS is a number or None.

    Lines that hold something else are passed by, with a warning that counts them; a last one cut short by a kill needs
    none. UnreadableFile where there is no such file.
    """
    texts = read_bytes(path).split(b"\n")
    cut_short = texts.pop()  # what follows the last line end
    lines = [_line(text) for text in texts]
    damaged = sum(line is None for line in lines)
    if damaged:
        warnings.warn(f"{path}: {damaged} of {len(texts)} lines are damaged, and were passed by", stacklevel=3)
    return [line for line in (*lines, _line(cut_short)) if line is not None]


def _line(text: bytes) -> dict[str, Any] | None:
    """The values of a line, None for those that are not finite; None for a damaged line."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            return None
        values["step"] = conform(Annotated[int, at_least(0, 2**63)], values["step"], "step")
        for name in NUMBERS & values.keys():
            number = values[name]
            lost = isinstance(number, float) and not math.isfinite(number)
            values[name] = None if lost else conform(float | None, number, name)
    except (ValueError, KeyError, RecursionError):
        return None
    return values


def import_trackers(names: tuple[str, ...]) -> list[ModuleType]:
    """The modules of experiment trackers; ConfigError says how to install one that is missing."""
    return [_import_tracker(name) for name in names]


def _import_tracker(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"train.trackers names {name}, which cannot be imported ({error}): run `pip install {name}`, or leave it "
            f"out; {FILE_NAME} and TensorBoard are written in any case"
        ) from error


def _start(module: ModuleType, folder: Path, config: dict[str, Any]) -> Any:
    """Begin, or go on with, the tracker's run of this output folder. Both packages have the same few functions."""
    place = folder.resolve()
    name = f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    identity = {"id": name, "dir": str(folder)} if module.__name__ == "wandb" else {}
    return module.init(project=PROJECT, name=name, config=config, resume="allow", **identity)
