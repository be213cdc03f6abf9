"""The pictures of the demo and what each shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mapet.data.cache import TokenCache
from mapet.data.sources import open_source
from mapet.demo.folder import DemoFolder
from mapet.demo.recipe import PhotoRecipe, Recipe
from mapet.demo.report import Picture
from mapet.demo.seed import fitted
from mapet.report.gallery import save_gallery
from mapet.report.loss_curve import draw_loss_curve, read_metrics
from mapet.report.who_sees_whom import draw_who_sees_whom
from mapet.tokenizers import load_tokenizer, make_tokenizer
from mapet.tokenizers.encode import tokenize

ROWS = 10
COLUMNS = 8


def loss_picture(folder: DemoFolder, recipe: Recipe, seeds: Sequence[int], token_entropy: float) -> Picture:
    """Loss, accuracy and learning rate of all seeds."""
    curves = {f"seed {seed}": read_metrics(folder.metrics(seed)) for seed in seeds}
    path = draw_loss_curve(folder.root / "loss.png", curves, vocabulary=recipe.vocabulary, token_entropy=token_entropy)
    return Picture(
        path,
        "Pre-training, one line per seed: the loss of predicting the hidden tokens, the share of them predicted right,"
        " and the learning rate. The horizontal lines are what guessing without looking at the image would give.",
    )


def visibility_picture(folder: DemoFolder) -> Picture:
    """Who sees whom, for an image of 4 x 4 patches."""
    return Picture(
        draw_who_sees_whom(folder.root / "who_sees_whom.png"),
        "Who sees whom in MaPeT. A row is a token that looks, a column one that is looked at; a coloured cell says that"
        " this row sees this column. The query stream, below, makes the predictions: it never sees the patch it"
        " predicts (hollow circles), only the context, the targets before it, and the positions of the others.",
    )


def digit_gallery(folder: DemoFolder, seed: int) -> Picture:
    """Entries of the codebook that one seed learned from."""
    cache, tokenizer = TokenCache.open(folder.seed(seed) / "cache"), load_tokenizer(folder.seed(seed) / "tokenizer")
    path = folder.root / "codebook_digits.png"
    _draw(path, cache, tokenizer.codebook, "Digits: patches that share a token")
    return Picture(
        path,
        "Entries of the digits' codebook, one a row: the average of its patches, then digits with the patch outlined."
        " Predicting such a token means to say which piece of a stroke belongs in a place.",
    )


def photo_gallery(folder: DemoFolder, recipe: PhotoRecipe) -> Picture:
    """Entries of a codebook of photographs, which is fitted for this picture."""
    photos, place = open_source("photos"), folder.root / "photos"
    fresh = make_tokenizer(
        "pixel", image_size=recipe.image_size, patch_size=recipe.patch_size, vocabulary=recipe.vocabulary
    )
    tokenizer = fitted(place / "tokenizer", fresh, photos, seed=0)
    tokenize(photos, tokenizer, place / "cache", image_size=recipe.image_size, workers=0)
    path = folder.root / "codebook_photos.png"
    _draw(path, TokenCache.open(place / "cache"), tokenizer.codebook, "Photographs: patches that share a token")
    return Picture(
        path,
        "The same for a codebook of photographs, fitted for this picture only: each row is one entry, its average, and"
        " patches that have its token, outlined in their surroundings. Shown are entries that occur in many of the"
        " photographs, of strong contrast and unlike each other.",
    )


def _draw(path: Path, cache: TokenCache, codebook: Tensor, title: str) -> None:
    ids = np.arange(len(cache))
    images, tokens = cache.images(ids), cache.tokens(ids)
    entries = striking_entries(codebook, tokens, ROWS)
    save_gallery(path, images, tokens, cache.grid, entries=entries, columns=COLUMNS, title=title)


def striking_entries(codebook: Tensor, tokens: Tensor, count: int) -> list[int]:
    """Ids of at most `count` entries worth a look, among those that occur in as many images as the median entry does.

    The first is the one of most contrast; each other one, of at least median contrast, is the farthest from those
    before it, brightness aside, so that not all show the same edge.
    """
    # How many images each entry occurs in.
    spread = np.bincount(np.concatenate([row.unique().numpy() for row in tokens]), minlength=len(codebook))
    common = np.flatnonzero(spread >= max(np.median(spread), 1))
    shapes = codebook.cpu().numpy()[common]
    shapes = shapes - shapes.mean(axis=1, keepdims=True)
    contrast = np.linalg.norm(shapes, axis=1)
    strong = contrast >= np.median(contrast)
    common, shapes = common[strong], shapes[strong]
    chosen = [int(np.linalg.norm(shapes, axis=1).argmax())]
    distance = np.linalg.norm(shapes - shapes[chosen[0]], axis=1)
    while len(chosen) < min(count, len(common)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(shapes - shapes[chosen[-1]], axis=1))
    return common[chosen].tolist()
