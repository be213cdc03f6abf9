"""How a codebook is used: histogram, perplexity, dead and repeated entries, and what counts as a collapse."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mapet.data.cache import TokenCache

DEAD_LIMIT = 0.1
"""A codebook has collapsed when a larger part of its entries is never used, or repeats another entry,"""
PERPLEXITY_LIMIT = 0.1
"""or when its perplexity is a smaller part of the vocabulary,"""
SHARE_LIMIT = 0.5
"""or when one entry takes a larger part of all tokens."""


class CollapseWarning(UserWarning):
    """A codebook whose tokens say little about the image."""


@dataclass(frozen=True)
class CodebookUsage:
    """How often each entry is used.

    Attributes:
        counts: (K,) int64.
        repeated: entries equal to an earlier one; they can never be used.
    """

    counts: np.ndarray
    repeated: int = 0

    @property
    def vocabulary(self) -> int:
        """Entries, K."""
        return len(self.counts)

    @property
    def total(self) -> int:
        """Tokens counted."""
        return int(self.counts.sum())

    @property
    def dead(self) -> np.ndarray:
        """Ids of entries that are never used, ascending."""
        return np.flatnonzero(self.counts == 0)

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the token frequencies: the number of equally used entries that would be as varied."""
        shares = self.counts[self.counts > 0] / max(self.total, 1)
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def largest_share(self) -> float:
        """Part of all tokens that the most used entry takes."""
        return float(self.counts.max() / max(self.total, 1))

    def collapse(self) -> tuple[str, ...]:
        """Why this is a collapsed codebook; empty where it is not."""
        reasons = []
        if len(self.dead) > DEAD_LIMIT * self.vocabulary:
            reasons.append(f"{len(self.dead)} of {self.vocabulary} entries are never used")
        if self.repeated > DEAD_LIMIT * self.vocabulary:
            reasons.append(f"{self.repeated} of {self.vocabulary} entries repeat another")
        if self.perplexity < PERPLEXITY_LIMIT * self.vocabulary:
            reasons.append(f"perplexity is {self.perplexity:.1f} with {self.vocabulary} entries")
        if self.vocabulary > 1 and self.largest_share > SHARE_LIMIT:
            reasons.append(f"entry {self.counts.argmax()} takes {self.largest_share:.0%} of all tokens")
        return tuple(reasons)


def count_usage(cache: TokenCache) -> CodebookUsage:
    """Usage of the codebook's entries by all tokens of a cache."""
    counts = np.zeros(cache.vocabulary, dtype=np.int64)
    for first in range(0, len(cache), 65536):
        counts += np.bincount(cache.token_array[first : first + 65536].reshape(-1), minlength=len(counts))
    return CodebookUsage(counts)


def repeated_entries(codebook: Tensor) -> dict[int, int]:
    """Entries of a codebook (K, F) that equal an earlier one, and the first one they equal; such are never used."""
    _, group = torch.unique(codebook.cpu(), dim=0, return_inverse=True)
    first: dict[int, int] = {}
    return {
        entry: first[number] for entry, number in enumerate(group.tolist()) if first.setdefault(number, entry) != entry
    }


def class_counts(tokens: np.ndarray, labels: np.ndarray, vocabulary: int, classes: int) -> np.ndarray:
    """How often every entry occurs in the images of every class.

    Args:
        tokens: (n, P) integers in [0, vocabulary).
        labels: (n,) integers in [0, classes).
    Returns:
        (classes, vocabulary) int64.
    """
    counts = np.zeros(classes * vocabulary, dtype=np.int64)
    for first in range(0, len(tokens), 16384):
        some = slice(first, first + 16384)
        joint = labels[some, None].astype(np.int64) * vocabulary + tokens[some]
        counts += np.bincount(joint.reshape(-1), minlength=len(counts))
    return counts.reshape(classes, vocabulary)


def pointwise_mutual_information(counts: np.ndarray, floor: int = 1) -> np.ndarray:
    """log2( p(entry, class) / (p(entry) p(class)) ) in bits, from counts (classes, vocabulary).

    0 is what chance gives; 1 says that the entry is twice as frequent in the class as in all images. Rare entries score
    high by chance, so pairs that occur less than `floor` times are -infinity.
    """
    joint = counts.astype(np.float64)
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True) / max(joint.sum(), 1)
    enough = counts >= max(floor, 1)
    ratio = np.divide(joint, expected, out=np.zeros_like(joint), where=enough)
    return np.log2(ratio, out=np.full_like(joint, -np.inf), where=enough)


@dataclass(frozen=True)
class FitReport:
    """What fitting a codebook did, and how the patches it was fitted on use it.

    Attributes:
        tokenizer: its name.
        images, patches: seen; `rows` of the patches were drawn for the k-means.
        seed, init, iterations, tolerance, max_rows: settings of the sample and the k-means.
        source: fingerprint of the images and their order, where it is known.
        objectives: sum of squared distances for every redo and iteration; `redo` is the one kept.
        splits: empty clusters refilled in the redo kept.
        usage: of the final codebook, by the rows.
    """

    tokenizer: str
    features: int
    images: int
    patches: int
    rows: int
    seed: int
    init: str
    iterations: int
    objectives: tuple[tuple[float, ...], ...]
    redo: int
    splits: int
    usage: CodebookUsage
    tolerance: float = 0.0
    max_rows: int = 0
    source: str = ""

    @property
    def objective(self) -> float:
        """Sum of squared distances of the redo kept, in its last iteration."""
        return self.objectives[self.redo][-1]

    def summary(self) -> str:
        """A few lines for people."""
        usage, curve = self.usage, self.objectives[self.redo]
        lines = [
            f"codebook {self.tokenizer}: {usage.vocabulary} entries of {self.features} numbers, "
            f"from {self.rows} of {self.patches} patches of {self.images} images",
            f"k-means: {self.init} start, seed {self.seed}, best of {len(self.objectives)} redos is {self.redo + 1}; "
            f"objective {curve[0]:.6g} to {curve[-1]:.6g} in {len(curve)} iterations, {self.splits} splits",
            f"usage: perplexity {usage.perplexity:.1f} of {usage.vocabulary}, {len(usage.dead)} dead, "
            f"{usage.repeated} repeated, most used entry {usage.largest_share:.1%}",
        ]
        if reasons := usage.collapse():
            lines.append(f"COLLAPSED: {'; '.join(reasons)}")
        return "\n".join(lines)


def warn_of_collapse(usage: CodebookUsage, tokenizer: str) -> None:
    """Warn, as CollapseWarning, where the usage is that of a collapsed codebook."""
    if reasons := usage.collapse():
        warnings.warn(
            f"the codebook of tokenizer {tokenizer} has COLLAPSED: {'; '.join(reasons)}. A model cannot learn much "
            "from such tokens: lower the vocabulary, give more varied images, or check the features",
            CollapseWarning,
            stacklevel=3,
        )
