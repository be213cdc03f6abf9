"""Import of token files in the layout of the official code (aimagelab/MaPeT): tensors of tokens beside a CSV of images.

Row i of the concatenated tensors belongs to row i of the CSV. The official trainer concatenates its shards by file
modification time, so that a copied folder silently permutes the labels; here the order is the caller's, or that of the
index in the files' names.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mapet.data.jobs import Preparation
from mapet.data.manifest import CacheDescription
from mapet.data.sources import FileSource
from mapet.errors import DataError
from mapet.files import FileRecord, UnreadableFile, map_array, read_bytes, read_pickle, unreadable
from mapet.tokenizers.encode import TokenizeReport, build_cache

HEADER = ["path", "class"]
MOST_CLASSES = 2**20
NAMES = {
    "kclip": ("k_means", "kmeans", "kclip"),
    "vqkd": ("vqkd", "vq_kd", "vq-kd"),
    "dalle": ("dalle", "dall-e", "dall_e"),
}
"""What occurs in the names of token files, by tokenizer."""
INTEGERS = (torch.int16, torch.int32, torch.int64)


def import_official(
    token_files: str | Path | Sequence[str | Path],
    csv_file: str | Path,
    root: str | Path,
    output: str | Path,
    *,
    image_size: int = 224,
    vocabulary: int = 8192,
    tokenizer: str | None = None,
    class_names: str | Path | None = None,
    **options: Any,
) -> TokenizeReport:
    """Make a token cache of official token files and the images they were made from.

    Args:
        token_files: the shards in the order of the CSV's rows; or one folder, whose .pth and .pt files are taken in the
            order of `ordered_token_files`; or one file. Each is an int16, int32 or int64 tensor (n, P).
        csv_file: header `path,class`; the path below `root` and the class number of each image.
        root: folder of the images. They are read as the official code reads them, by Pillow's convert("RGB") alone:
            no EXIF orientation, no background behind alpha, no scaling of 16-bit grey.
        vocabulary: tokens must be in [0, vocabulary).
        tokenizer: the name the cache gives for the tokenizer; by default what the files' names say, else "official".
        options: overwrite, shard_images, world, batch_size and others of `mapet.tokenizers.encode.build_cache`.
        class_names: label_encoder_classes.npy, an array of text; without it classes are called by their numbers.
    Raises:
        DataError: naming the file: not a token tensor (files are loaded without running code), more or fewer rows than
            the CSV, P that is no square, tokens out of range; and all that `mapet.tokenizers.encode.tokenize` raises.
    """
    files = _shards(token_files)
    names, labels = read_csv(Path(csv_file), Path(root))
    tokens = _read_tokens(files, len(names), Path(csv_file), vocabulary)
    classes = _class_names(class_names, int(labels.max()) + 1)
    source = FileSource(Path(root), names, labels, classes, plain=True)
    description = CacheDescription(
        image_size=image_size,
        grid=math.isqrt(tokens.shape[1]),
        vocabulary=vocabulary,
        tokenizer=tokenizer or tokenizer_of(files),
        tokenizer_fingerprint=_fingerprint([*files, Path(csv_file)]),
        source_fingerprint=source.fingerprint(),
    )

    preparation = Preparation(source, image_size)
    return build_cache(preparation, output, description, lambda batch: tokens[batch.ids], **options)


def tokenizer_of(files: Sequence[Path]) -> str:
    """What made the tokens, as far as the names of the files and of their folder say."""
    said = " ".join(f"{path.parent.name} {path.name}" for path in files).lower()
    found = [name for name, words in NAMES.items() if any(word in said for word in words)]
    return found[0] if len(found) == 1 else "official"


def ordered_token_files(folder: str | Path) -> list[Path]:
    """The .pth and .pt files of a folder by the number after `index_` in their names, or else the last number in them.

    Raises:
        DataError: no such file, a name without a number, or two names with the same one.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".pth", ".pt"))
    if not files:
        raise DataError(f"no token file (.pth or .pt) in {folder}")
    if len(files) == 1:
        return files
    by_index: dict[int, Path] = {}
    for path in files:
        found = re.search(r"index_(\d+)", path.stem) or re.search(r"(\d+)\D*$", path.stem)
        if found is None:
            raise DataError(f"{path} has no number in its name to order it by; list the files in the order of the CSV")
        other = by_index.setdefault(int(found[1]), path)
        if other != path:
            raise DataError(
                f"{other} and {path} have the same number {found[1]}; list the files in the order of the CSV"
            )
    return [by_index[index] for index in sorted(by_index)]


def read_csv(path: Path, root: Path) -> tuple[list[str], np.ndarray]:
    """Image names, relative to `root`, and labels (n,) int64 of an official CSV.

    Raises:
        DataError: naming file and line: another header, a class that is no number from 0, or a path that leaves `root`.
    """
    names: list[str] = []
    labels: list[int] = []
    try:
        with io.StringIO(read_bytes(path).decode("utf-8"), newline="") as file:
            rows = csv.reader(file)
            header = next(rows, None)
            if header != HEADER:
                raise DataError(f"{path} starts with {header}, expected the header {','.join(HEADER)}")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if len(row) != 2 or not row[1].isdecimal() or int(row[1]) >= MOST_CLASSES:
                    raise DataError(f"{where}: {row}; expected a path and a class number below {MOST_CLASSES}")
                names.append(_below(root, row[0], where))
                labels.append(int(row[1]))
    except (ValueError, csv.Error) as error:
        raise unreadable(path, error) from error
    if not names:
        raise DataError(f"{path} lists no image")
    return names, np.array(labels, dtype=np.int64)


def _below(root: Path, name: str, where: str) -> str:
    """The name relative to root; an absolute one must lie in it."""
    top = os.path.abspath(root)
    path = os.path.normpath(os.path.join(top, name))
    if not path.startswith(top.rstrip(os.sep) + os.sep):
        raise DataError(f"{where}: {name} is not below the image folder {root}")
    return Path(path).relative_to(top).as_posix()


def _shards(token_files: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(token_files, str | Path):
        path = Path(token_files)
        return ordered_token_files(path) if path.is_dir() else [path]
    return [Path(path) for path in token_files]


def _read_tokens(files: list[Path], rows: int, csv_file: Path, vocabulary: int) -> Tensor:
    """All shards as one (rows, P) tensor."""
    shards = [_load(path) for path in files]
    lengths = [len(shard) for shard in shards]
    if sum(lengths) != rows:
        held = ", ".join(f"{path.name}: {length}" for path, length in zip(files, lengths, strict=True))
        raise DataError(f"{csv_file} lists {rows} images, the token files hold {sum(lengths)} rows ({held})")
    for path, shard in zip(files, shards, strict=True):
        patches = shard.shape[1]
        if patches != shards[0].shape[1] or math.isqrt(patches) ** 2 != patches or patches == 0:
            raise DataError(
                f"{path} holds {patches} tokens an image, {files[0]} {shards[0].shape[1]}; expected one square"
            )
        low, high = shard.min().item(), shard.max().item()
        if low < 0 or high >= vocabulary:
            raise DataError(f"{path} holds tokens {low} to {high}, allowed are 0 to {vocabulary - 1}")
    return torch.cat([shard.int() for shard in shards])


def _load(path: Path) -> Tensor:
    try:
        tokens = read_pickle(path)
    except UnreadableFile as error:
        raise DataError(f"cannot load tokens from {path} (no code in it was run): {error.reason}") from error
    if not isinstance(tokens, Tensor):
        raise DataError(f"{path} holds a {type(tokens).__name__}, expected one tensor of tokens")
    if tokens.dtype not in INTEGERS or tokens.dim() != 2 or not len(tokens):
        raise DataError(
            f"{path} holds {tokens.dtype} {tuple(tokens.shape)}, expected int16, int32 or int64 (images, patches)"
        )
    return tokens


def _class_names(path: str | Path | None, classes: int) -> list[str]:
    if path is None:
        return [str(number) for number in range(classes)]
    try:
        names = map_array(path)
    except UnreadableFile as error:
        raise DataError(f"cannot read class names from {path}: {error.reason}") from error
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(f"{path} is not a one-dimensional array of text")
    if len(names) < classes:
        raise DataError(f"{path} names {len(names)} classes, the CSV has class numbers up to {classes - 1}")
    return names.tolist()


def _fingerprint(files: list[Path]) -> str:
    return hashlib.sha256("".join(FileRecord.of(path).sha256 for path in files).encode()).hexdigest()
