"""Labels: whether they can be used, and draws from them that a seed fixes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mapet.errors import ConfigError, DataError


def check_labels(
    labels: np.ndarray | None, count: int, what: str, *, classes: Sequence[str] | None = None
) -> np.ndarray:
    """The labels as int64 (n,). Raises DataError when there are none, too few, or of one class only."""
    if labels is None:
        raise DataError(
            f"the {what} images have no labels; labels come from class sub-folders: FOLDER/CLASS NAME/image.jpg"
        )
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"the {what} labels must be integers (n,), got {labels.dtype} {labels.shape}")
    if len(labels) != count:
        raise DataError(f"there are {count} {what} images but {len(labels)} labels")
    if len(present := np.unique(labels)) < 2:
        only = f" ({class_name(present[0], classes)})" if len(present) else ""
        raise DataError(f"the {what} images are all of one class{only}; a probe needs at least two class sub-folders")
    return labels.astype(np.int64)


def check_same_classes(train: np.ndarray, test: np.ndarray, *, classes: Sequence[str] | None = None) -> None:
    """Raise DataError when a class occurs in the test images only: no probe could name it."""
    if unseen := sorted(set(test.tolist()) - set(train.tolist())):
        names = ", ".join(class_name(i, classes) for i in unseen[:8])
        raise DataError(f"{len(unseen)} classes occur in the test images only: {names}")


def draw_per_class(
    labels: np.ndarray, per_class: int, *, seed: int, classes: Sequence[str] | None = None
) -> np.ndarray:
    """Ids of `per_class` images of every class, sorted; the same for the same seed.

    Raises DataError naming the classes that have fewer.
    """
    if per_class < 1:
        raise ConfigError(f"labels per class must be at least 1, got {per_class}")
    present, counts = np.unique(labels, return_counts=True)
    if small := [(i, n) for i, n in zip(present, counts, strict=True) if n < per_class]:
        names = ", ".join(f"{class_name(i, classes)} ({n})" for i, n in small[:8])
        raise DataError(f"{per_class} labels per class were asked for, but {len(small)} classes have fewer: {names}")
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.choice(np.flatnonzero(labels == i), per_class, replace=False) for i in present]))


def split(
    labels: np.ndarray, *, test_fraction: float = 0.2, seed: int = 0, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint sorted ids (train, test), class by class, with at least one image of every class on either side.

    Raises DataError naming the classes with a single image.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError(f"test_fraction must be in (0, 1), got {test_fraction}")
    rng = np.random.default_rng(seed)
    train, test = [], []
    for i in np.unique(labels):
        ids = rng.permutation(np.flatnonzero(labels == i))
        if len(ids) < 2:
            raise DataError(f"class {class_name(i, classes)} has one image; a split into train and test needs two")
        cut = min(max(round(len(ids) * test_fraction), 1), len(ids) - 1)
        test.append(ids[:cut])
        train.append(ids[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def class_name(i: int, classes: Sequence[str] | None) -> str:
    """The folder name of a class where there is one, its number otherwise."""
    return repr(classes[i]) if classes is not None else str(int(i))
