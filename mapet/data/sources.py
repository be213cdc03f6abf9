"""Images by name: a folder, a list of files, or a built-in set."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mapet.data.builtin import DigitSource, PhotoSource
from mapet.data.decode import decode
from mapet.data.images import ImageSource, fingerprint_of
from mapet.errors import ConfigError, DataError
from mapet.folders import instead

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

PARTS = ("train", "training", "val", "valid", "validation", "test", "testing")
"""What folders of the parts of a set are called, those to train on first."""


class FileSource(ImageSource):
    """A list of files under a root, in the order given.

    Args:
        root: folder that the names are relative to.
        names: paths relative to the root.
        labels, classes: as in ImageSource.
        plain: read them as the official code does (`mapet.data.decode.decode`).
        parts: folders of the root that are the parts of a set, such as train and val; they are no classes.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        labels: np.ndarray | None = None,
        classes: list[str] | None = None,
        *,
        plain: bool = False,
        parts: tuple[str, ...] = (),
    ) -> None:
        self.root, self.names, self.labels, self.classes, self.plain = Path(root), names, labels, classes, plain
        self.parts = parts

    def load(self, index: int) -> Image.Image:
        path = self.root / self.names[index]
        return decode(path, name=str(path), plain=self.plain)

    def fingerprint(self) -> str:
        """Of names and sizes in bytes: cheap for millions of files, blind to a change that keeps a file's size.

        The sizes are those when it was first asked for.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        found = ((name, _stat(self.root / name)) for name in self.names)
        return fingerprint_of(f"{name}\0{size.st_size if size else -1}" for name, size in found)


def folder_source(root: str | Path) -> FileSource:
    """All images below a folder, sorted by name.

    Images are labelled by the first folder below the root when every image lies in one, else unlabelled. Where the
    first folders are the parts of a set (train, val, ...) it is the folder below them, with a warning. Hidden files,
    files with other extensions, named pipes and devices are left out. Links are followed, but each folder is entered
    once, with a warning.

    Raises:
        DataError: no such folder, no image in it, or a folder that cannot be listed or that links back into itself.
    """
    root = Path(root)
    try:
        is_folder = stat.S_ISDIR(os.stat(root).st_mode)
    except (OSError, ValueError) as error:
        raise DataError(
            f"image folder {root}: {getattr(error, 'strerror', error)}; give a folder of images, or one of {BUILT_IN}"
        ) from error
    if not is_folder:
        raise DataError(f"{root} is a file; give a folder of images, or one of {BUILT_IN}")
    names, doubled = _walk(root)
    if doubled:
        warnings.warn(
            f"{root}: {len(doubled)} links to folders that were entered already are passed by, such as {doubled[0]}",
            stacklevel=2,
        )
    if not names:
        looked_for = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"no image in {root} or its sub-folders{instead(root)}; looked for {looked_for}")
    parts = _parts_of_a_set(names)
    if parts:
        warnings.warn(
            f"{root} holds the parts of a set ({', '.join(parts)}): its images are taken together, labelled by the "
            f"folders below these; to take one part, give {root / parts[0]}",
            stacklevel=2,
        )
    folders = [name.split("/")[int(bool(parts)) : -1] for name in names]
    if not all(folders):
        return FileSource(root, names, parts=parts)
    classes, labels = np.unique([below[0] for below in folders], return_inverse=True)
    return FileSource(root, names, labels.astype(np.int64), classes.tolist(), parts=parts)


def _parts_of_a_set(names: Sequence[str]) -> tuple[str, ...]:
    """The first folders, those to train on before the others, where they are called like the parts of a set."""
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in names}
    called = {top.lower() for top in tops}
    if not called <= set(PARTS) or called <= {"test", "testing"}:
        return ()
    return tuple(sorted(tops, key=lambda top: PARTS.index(top.lower())))


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Names of the images below the root, sorted, and of folders passed by, as they were entered under another name.

    Each folder is entered once, under the first of its names in sorted order, so that links cannot multiply.
    """
    names, doubled, entered = [], [], set()
    waiting: list[tuple[str, tuple[str, ...]]] = [("", ())]  # a folder, and the real paths from the root down to it
    while waiting:
        below, parents = waiting.pop()
        real = os.path.realpath(root / below)
        if real in parents:
            raise DataError(f"image folder {root / below} links back to {real}, which contains it; remove the link")
        if real in entered:
            doubled.append(below)
            continue
        entered.add(real)
        try:
            with os.scandir(root / below) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"cannot list image folder {root / below}: {error.strerror}") from error
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name, found = f"{below}/{entry.name}" if below else entry.name, _stat(entry.path)
            if found and stat.S_ISDIR(found.st_mode):
                folders.append((name, (*parents, real)))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and (not found or stat.S_ISREG(found.st_mode)):
                names.append(name)
        waiting.extend(reversed(folders))
    return sorted(names), doubled


def _stat(path: str | Path) -> os.stat_result | None:
    """None for what is missing or leads nowhere; with an image's name it is reported by that when it is loaded."""
    try:
        return os.stat(path)
    except OSError:
        return None


BUILT_IN = "digits, photos, photos:TILE, photos:TILE:STRIDE"


def open_source(spec: str | Path) -> ImageSource:
    """A source by name.

    "digits" is scikit-learn's 1,797 labelled digits, "photos" scikit-image's bundled photographs, "photos:96" those cut
    into squares of 96 pixels, "photos:96:48" with a square every 48 pixels. Everything else is a folder
    (`folder_source`); a folder that is called like a built-in set is given as "./digits".

    Raises:
        DataError: an empty or missing folder, an uninstalled package, or a name that could mean either.
        ConfigError: a tile or stride that is no positive integer.
    """
    name, *sizes = str(spec).split(":")
    if spec in ("digits", "photos") and os.path.isdir(spec):
        raise DataError(f"{spec} is a built-in set, and a folder here: give ./{spec} for the folder")
    if name == "digits" and not sizes:
        return DigitSource()
    if name == "photos" and len(sizes) <= 2:
        return PhotoSource(*_positive(sizes, spec))
    return folder_source(spec)


def _positive(sizes: Sequence[str], spec: str | Path) -> list[int]:
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(f"image source {str(spec)!r}: tile and stride are positive integers, as in photos:96:48")
    return [int(size) for size in sizes]
