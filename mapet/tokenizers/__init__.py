"""Visual tokenizers: images to codebook ids. `make_tokenizer` for a new one, `load_tokenizer` for a saved one.

A tokenizer is one file, with its class, and one line here. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapet.errors import ConfigError, DataError
from mapet.registry import registered

if TYPE_CHECKING:
    import torch

    from mapet.config import Precision
    from mapet.tokenizers.kmeans import KMeansTokenizer

TOKENIZERS: dict[str, str] = {
    "pixel": "mapet.tokenizers.pixel:PixelTokenizer",
    "kclip": "mapet.tokenizers.kclip:KClipTokenizer",
}
"""The class of each tokenizer, as module:class."""


def tokenizer_class(name: str) -> type[KMeansTokenizer]:
    """The class of a tokenizer. ConfigError for an unknown name."""
    return registered(TOKENIZERS, name, "tokenizer")


def make_tokenizer(
    name: str,
    *,
    image_size: int = 224,
    patch_size: int = 16,
    vocabulary: int = 8192,
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
    weights: str | Path | None = None,
    codebook: str | Path | None = None,
) -> KMeansTokenizer:
    """A tokenizer by name; without a codebook until it is fitted.

    Args:
        image_size, patch_size: of the model, in pixels; they fix the grid of tokens.
        precision, weights: of the network behind it, where it has one. Precision None is fp16 on a GPU, else fp32.
        codebook: .npy file of float32 centroids (vocabulary, features), or a faiss IndexFlatL2 of them, such as the
            official k-CLIP code writes.

    Raises:
        ConfigError: unknown name, sizes that do not fit, or a network option for a tokenizer without a network.
        WeightsMissingError: weights neither given, cached nor downloadable.
        DataError: damaged weights or codebook.
    """
    kind, options = tokenizer_class(name), {"precision": precision, "weights": weights}
    if not kind.has_network:
        if weights is not None or precision not in (None, "fp32"):
            raise ConfigError(f"tokenizer {name} has no network: weights and precision are for kclip")
        options = {}
    tokenizer = kind(image_size, patch_size, vocabulary, device, **options)
    if codebook is not None:
        from mapet.tokenizers.foreign.official_codebook import read_official_codebook

        tokenizer.set_codebook(read_official_codebook(codebook), str(codebook))
    return tokenizer


def load_tokenizer(
    folder: str | Path, *, device: str | torch.device = "cpu", weights: str | Path | None = None
) -> KMeansTokenizer:
    """The tokenizer saved in a folder. Its network weights, where it has a network, are found as when it was made.

    DataError names what is missing, damaged or different; WeightsMissingError as for `make_tokenizer`.
    """
    from mapet.tokenizers import store

    name = store.read_manifest(Path(folder)).name
    if name not in TOKENIZERS:
        raise DataError(f"{folder} holds an unknown tokenizer {name!r}; known are {', '.join(TOKENIZERS)}")
    kind = tokenizer_class(name)
    options: dict[str, Any] = {"weights": weights} if kind.has_network else {}
    return kind.load(folder, device=device, **options)
