"""Visual tokenizers: images to codebook ids. `make_tokenizer` for a new one, `load_tokenizer` for a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mapet.config import Precision
from mapet.errors import ConfigError, DataError
from mapet.tokenizers import store
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.foreign.official_codebook import read_official_codebook
from mapet.tokenizers.kclip import KClipTokenizer
from mapet.tokenizers.pixel import PixelTokenizer

TOKENIZERS: dict[str, type[Tokenizer]] = {"pixel": PixelTokenizer, "kclip": KClipTokenizer}


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
) -> Tokenizer:
    """A tokenizer by name, "pixel" or "kclip"; without a codebook until it is fitted.

    Args:
        image_size, patch_size: of the model, in pixels; they fix the grid of tokens.
        precision, weights: of the network behind kclip; pixel has none. Precision None is fp16 on a GPU, else fp32.
        codebook: .npy file of float32 centroids (vocabulary, features), or a faiss IndexFlatL2 of them, such as the
            official k-CLIP code writes.

    Raises:
        ConfigError: unknown name, sizes that do not fit, or a network option for pixel.
        WeightsMissingError: weights neither given, cached nor downloadable.
        DataError: damaged weights or codebook.
    """
    if name not in TOKENIZERS:
        raise ConfigError(f"unknown tokenizer {name!r}; choose one of {', '.join(TOKENIZERS)}")
    options: dict[str, Any] = {"precision": precision, "weights": weights}
    if name == "pixel":
        if weights is not None or precision not in (None, "fp32"):
            raise ConfigError("tokenizer pixel has no network: weights and precision are for kclip")
        options = {}
    tokenizer = TOKENIZERS[name](image_size, patch_size, vocabulary, device, **options)
    if codebook is not None:
        tokenizer.set_codebook(read_official_codebook(codebook), str(codebook))
    return tokenizer


def load_tokenizer(
    folder: str | Path, *, device: str | torch.device = "cpu", weights: str | Path | None = None
) -> Tokenizer:
    """The tokenizer saved in a folder. Its network weights, where it has a network, are found as when it was made.

    DataError names what is missing, damaged or different; WeightsMissingError as for `make_tokenizer`.
    """
    name = store.read_manifest(Path(folder)).name
    if name not in TOKENIZERS:
        raise DataError(f"{folder} holds an unknown tokenizer {name!r}; known are {', '.join(TOKENIZERS)}")
    options = {} if name == "pixel" else {"weights": weights}
    return TOKENIZERS[name].load(folder, device=device, **options)
