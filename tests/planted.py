"""Files that try to do harm, and a folder of everything that mapet reads, for them to be planted in."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_weights import SMALL, random_weights
from command_line import FIT, SIZES, TRAINING, pictures
from safetensors.torch import save_file

from mapet.cli import main

PROBING = ("--methods", "knn", "--neighbours", 3, "--labels-per-class", 0, "--device", "cpu")
CHECKPOINT = "run/checkpoints/step_000000002"


class Trap:
    """A pickle of this makes a file when it is loaded as pickles are."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return open, (str(self.canary), "w")


def traps(canary: Path) -> dict[str, bytes]:
    """Contents that run code in careless hands."""
    zipped, legacy, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": Trap(canary)}, zipped)
    torch.save({"state_dict": Trap(canary)}, legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Trap(canary)], dtype=object), allow_pickle=True)
    contents = {"zip": zipped, "legacy": legacy, "npy": array, "pickle": io.BytesIO(pickle.dumps(Trap(canary)))}
    return {name: content.getvalue() for name, content in contents.items()}


def make_everything(folder: Path) -> None:
    """One of all that mapet reads."""
    images = pictures(folder / "images", per_class=10)
    at = places(folder)
    succeed("tokenize", "--images", images, "--output", at["cache"], *SIZES, *FIT)
    run = ("--cache", at["cache"], "--output", folder / "run", *TRAINING, "--train.ema-decay=0.9")
    succeed("pretrain", *run, "--max-steps", 2)
    succeed("export", "--checkpoint", folder / "run", "--output", folder / "export")
    succeed(*COMMANDS["probe"](folder))
    tokens = torch.zeros(20, 16, dtype=torch.int32)
    (folder / "tokens").mkdir()
    for i, part in enumerate(tokens.split(10)):
        torch.save(part, folder / f"tokens/index_{i}.pth")
    rows = [f"{path.relative_to(images)},{i // 10}" for i, path in enumerate(sorted(images.rglob("*.png")))]
    (folder / "list.csv").write_text("\n".join(["path,class", *rows]) + "\n")
    np.save(folder / "classes.npy", np.array(["bars", "dots"]))
    np.save(folder / "codebook.npy", np.random.default_rng(0).random((16, 48), dtype=np.float32))
    weights = random_weights(**SMALL)
    save_file(weights, folder / "clip.safetensors")
    torch.save(weights, folder / "clip.pt")
    stop_fits(folder)


def stop_fits(folder: Path) -> None:
    """Fits that were interrupted after an iteration, one in memory and one in files."""
    from mapet.commands import tokenize as command

    def interrupt(done: Any) -> None:
        raise KeyboardInterrupt

    kept, command.iteration_lines = command.iteration_lines, lambda options: interrupt
    try:
        for name in ("fit", "fit from files"):
            assert main([*map(str, COMMANDS[name](folder))]) == 130
    finally:
        command.iteration_lines = kept


def places(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in ("cache", "images", "memory", "files", "files_features")}


def _fitting(folder: Path, name: str, *more: object) -> tuple:
    fit = ("tokenize", "--images", folder / "images", "--output", folder / name, *SIZES, *FIT)
    return (*fit, "--fit-save-every", 1e-9, *more)


COMMANDS: dict[str, Callable[[Path], tuple]] = {
    "resume": lambda at: (
        *("pretrain", "--cache", at / "cache", "--output", at / "run", *TRAINING, "--max-steps", 3),
        "--train.ema-decay=0.9",
    ),
    "export": lambda at: ("export", "--checkpoint", at / "run", "--output", at / "exported", "--ema"),
    "probe": lambda at: (
        *("probe", "--checkpoint", at / "export", "--images", at / "cache", "--output", at / "probed", *PROBING),
    ),
    "train": lambda at: (
        *("pretrain", "--cache", at / "cache", "--output", at / "another", *TRAINING, "--max-steps", 1),
    ),
    "codebook": lambda at: ("codebook", "--cache", at / "cache", "--output", at / "report"),
    "tokenize": lambda at: (
        *("tokenize", "--images", at / "images", "--codebook", at / "cache_tokenizer"),
        *("--output", at / "new", "--workers", 0),
    ),
    "centroids": lambda at: (
        *("tokenize", "--images", at / "images", "--codebook", at / "codebook.npy"),
        *("--output", at / "new", "--workers", 0, *SIZES),
    ),
    "fit": lambda at: _fitting(at, "memory"),
    "fit from files": lambda at: _fitting(at, "files", "--features-dir", at / "files_features"),
    "import": lambda at: (
        *("tokenize", "--import-tokens", at / "tokens", "--csv", at / "list.csv", "--root", at / "images"),
        *("--class-names", at / "classes.npy", "--output", at / "new", "--workers", 0, "--image-size", 16),
    ),
    "weights": lambda at: (*_fitting(at, "new", "--tokenizer", "kclip", "--weights", at / "clip.pt"),),
    "safe weights": lambda at: (*_fitting(at, "new", "--tokenizer", "kclip", "--weights", at / "clip.safetensors"),),
}
"""What reads the files, by a name; `tests/test_untrusted.py` lists the files of each."""


def succeed(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def rehash(folder: Path, changed: Path) -> None:
    """Make the hashes fit again after a file below the folder was changed, as whoever changes one can."""
    place, content = changed.parent, changed.read_bytes() if changed.is_file() else b""
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if changed.name == "kmeans":
        changed.write_bytes(hashlib.sha256(content[32:]).digest() + content[32:])
    elif (manifest := place / "tokenizer.json").exists() and changed.name == "codebook.safetensors":
        edit(manifest, lambda values: values.update(codebook_sha256=record["sha256"]))
    elif (manifest := place / "manifest.json").exists() and changed != manifest:
        edit(manifest, lambda values: values["files"].update({changed.name: record}))
    elif changed.name == "features_00000.npy" and (part := place / "part_00000.json").exists():
        edit(part, lambda values: values["files"].update({changed.name: record}))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the values in a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@contextmanager
def no_hang(seconds: int = 60) -> Iterator[None]:
    """A block that waits for ever fails."""

    def fail(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
