"""The command line inside the test process, and small folders of pictures for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mapet.cli import main

SIZES = ("--image-size", 16, "--patch-size", 4, "--vocabulary", 16)
FIT = ("--fit-redos", 1, "--fit-iterations", 3, "--workers", 0, "--batch-size", 16)
MODEL = {"image_size": 16, "patch_size": 4, "vocabulary": 16, "width": 32, "depth": 2, "heads": 2}


def training(**model: object) -> list[str]:
    """Options of a small run, 5 steps an epoch on 40 images; `model` changes fields of its model."""
    run = ["--cut", "5", "--epochs", "4", "--warmup-epochs", "1", "--batch", "8", "--workers", "0", "--device", "cpu"]
    return [f"--model.{name.replace('_', '-')}={value}" for name, value in {**MODEL, **model}.items()] + run


TRAINING = training()
PROBE = ("--neighbours", 5, "--labels-per-class", 3, "--epochs", 2, "--batch", 8)


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Mapet:
    """Runs `mapet ARGUMENTS`; the arguments may be paths and numbers."""

    def __init__(self, capsys) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self.capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *self.capsys.readouterr())

    def succeed(self, *arguments: object) -> Outcome:
        """Run and require exit code 0."""
        outcome = self(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome

    def fail(self, *arguments: object, code: int, names: tuple[object, ...]) -> Outcome:
        """Run and require the exit code, and on stderr one message without traceback that has all of `names` in it."""
        outcome = self(*arguments)
        assert outcome.code == code, outcome.err
        assert outcome.err.count("mapet: error: ") == 1 and "Traceback" not in outcome.err
        for name in names:
            assert str(name) in outcome.err
        return outcome


def pictures(folder: Path, *, per_class: int = 20, classes: tuple[str, ...] = ("bars", "dots"), seed: int = 0) -> Path:
    """PNG files of 20x18 pixels in class sub-folders, a class differing from the others in the direction of stripes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:18, :20]
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            stripes = 120 * ((columns if number % 2 else rows) // 4 % 2)
            noise = rng.integers(0, 120, (18, 20, 3))
            Image.fromarray((stripes[..., None] + noise).astype(np.uint8)).save(folder / name / f"{i:02d}.png")
    return folder


def everything_in(folder: Path) -> set[str]:
    """Paths below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
