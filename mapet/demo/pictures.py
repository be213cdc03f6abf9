"""The pictures of the demo and what each shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mapet.data.build import count_usage
from mapet.data.cache import TokenCache
from mapet.data.images import open_source
from mapet.demo.folder import DemoFolder, SeedResult
from mapet.demo.recipe import Recipe
from mapet.demo.seed import fitted
from mapet.report.gallery import draw_gallery, entry_rows
from mapet.report.loss_curve import draw_loss_curve, read_metrics
from mapet.report.picture import Picture
from mapet.report.who_sees_whom import draw_who_sees_whom
from mapet.tokenizers import load_tokenizer
from mapet.tokenizers.encode import tokenize

ROWS = 10


def draw_pictures(folder: DemoFolder, recipe: Recipe, results: Sequence[SeedResult]) -> list[Picture]:
    """Draw all pictures anew."""
    root, first = folder.root, folder.seed(results[0].seed)
    curves = {f"seed {result.seed}": read_metrics(folder.metrics(result.seed)) for result in results}
    entropy = float(np.mean([result.token_entropy for result in results]))
    photos, place = open_source("photos"), root / "photos"
    of_photos = fitted(place / "tokenizer", photos, recipe.photo_size, 16, recipe.photo_vocabulary, seed=0)
    tokenize(photos, of_photos, place / "cache", image_size=recipe.photo_size, workers=0)
    codebook = load_tokenizer(first / "tokenizer").codebook
    return [
        Picture(
            draw_loss_curve(root / "loss.png", curves, vocabulary=recipe.model.vocabulary, token_entropy=entropy),
            "Pre-training, one line per seed: the loss of predicting the hidden tokens, the share of them predicted"
            " right, and the learning rate. The horizontal lines are what guessing without looking at the image would"
            " give.",
        ),
        Picture(
            draw_who_sees_whom(root / "who_sees_whom.png"),
            "Who sees whom in MaPeT. A row is a token that looks, a column one that is looked at; a coloured cell says"
            " that this row sees this column. The query stream, below, makes the predictions: it never sees the patch"
            " it predicts (hollow circles), only the context, the targets before it, and the positions of the others.",
        ),
        Picture(
            draw_codebook(root / "codebook_digits.png", first / "cache", codebook, "Digits"),
            "Entries of the digits' codebook, one a row: the average of its patches, then digits with the patch"
            " outlined. Predicting such a token means to say which piece of a stroke belongs in a place.",
        ),
        Picture(
            draw_codebook(root / "codebook_photos.png", place / "cache", of_photos.codebook, "Photographs"),
            "The same for a codebook of photographs, fitted for this picture only: each row is one entry, its average,"
            " and patches that have its token, outlined in their surroundings. Shown are entries that occur in many of"
            " the photographs, of strong contrast and unlike each other.",
        ),
    ]


def draw_codebook(path: Path, folder: Path, codebook: Tensor, what: str) -> Path:
    """Draw striking entries of the codebook that a cache was made with."""
    cache = TokenCache.open(folder)
    tokens, counts = cache.token_array, count_usage(cache).counts
    rows = entry_rows(tokens, counts, striking_entries(codebook, tokens, ROWS))
    of = f"{np.count_nonzero(counts)} entries in use, {len(cache)} images of {cache.grid} x {cache.grid} patches"
    return draw_gallery(
        path, cache, rows, title=f"{what}: patches that share a token", subtitle=f"{len(rows)} of the {of}"
    )


def striking_entries(codebook: Tensor, tokens: np.ndarray, count: int) -> list[int]:
    """Ids of at most `count` entries worth a look, among those that occur in as many images as the median entry does.

    The first is the one of most contrast; each other one, of at least median contrast, is the farthest from those
    before it, brightness aside, so that not all show the same edge.
    """
    spread = np.bincount(np.concatenate([np.unique(row) for row in tokens]), minlength=len(codebook))  # images of each
    common = np.flatnonzero(spread >= max(np.median(spread), 1))
    shapes = codebook.cpu().numpy()[common]
    shapes = shapes - shapes.mean(axis=1, keepdims=True)
    contrast = np.linalg.norm(shapes, axis=1)
    strong = contrast >= np.median(contrast)
    common, shapes, contrast = common[strong], shapes[strong], contrast[strong]
    chosen, distance = [int(contrast.argmax())], np.full(len(common), np.inf)
    while len(chosen) < min(count, len(common)):
        distance = np.minimum(distance, np.linalg.norm(shapes - shapes[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return common[chosen].tolist()
