"""A tokenizer on disk: codebook.safetensors with the numbers, tokenizer.json with what they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from torch import Tensor

from mapet import __version__
from mapet.checked import conform
from mapet.errors import DataError
from mapet.files import (
    UnreadableFile,
    check_like,
    parsed_json,
    read_record,
    read_tensors,
    replacing,
    sha256_of,
    tensors_metadata,
    write_through,
)
from mapet.folders import LOCK, PARTIAL_FILES, TOKENIZER, check_place, instead
from mapet.tokenizers.usage import CodebookUsage, FitReport

CODEBOOK = "codebook.safetensors"
MANIFEST = "tokenizer.json"
UNFINISHED = "fit"
"""Folder of a fit that is not done."""
PROVENANCE = "provenance"
"""Metadata of codebook.safetensors, as JSON: all of tokenizer.json but the hash of the file itself."""
MOST_WORDS = 2**24
"""Bytes of the header of codebook.safetensors."""
FORMAT = 1


@dataclass(frozen=True)
class StoredTokenizer:
    """tokenizer.json: what makes the tokenizer again, what it is, and where its codebook came from."""

    name: str
    settings: dict[str, int | str]
    input_size: int
    grid: int
    features: int
    network: dict[str, str] | None
    fingerprint: str
    codebook_source: str
    codebook_sha256: str = ""
    """Of the file codebook.safetensors."""
    fit: dict[str, Any] | None = None
    """FitReport, its counts aside: those are in codebook.safetensors."""
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"mapet": __version__, "torch": torch.__version__}
    )
    format: int = FORMAT


def write(folder: Path, stored: StoredTokenizer, codebook: Tensor, report: FitReport | None) -> None:
    """Write both files, each whole or not at all, the manifest last.

    ConfigError where no tokenizer may be, DataError where the disk does not take it or files of others have its names.
    """
    check_place(folder, TOKENIZER, option="the folder")
    if any((folder / name).exists() for name in (CODEBOOK, MANIFEST)) and not _is_ours(folder):
        raise DataError(f"{folder} has a {CODEBOOK} or {MANIFEST} of something else, which is left as it is")
    tensors = {"codebook": codebook.cpu()}
    if report is not None:
        tensors["usage_counts"] = torch.from_numpy(report.usage.counts)
    stored = dataclasses.replace(stored, fit=_fit_to_json(report) if report else None)
    # One key, since safetensors writes several in no fixed order.
    payload = safetensors.torch.save(tensors, {PROVENANCE: json.dumps(_provenance(stored), sort_keys=True)})
    stored = dataclasses.replace(stored, codebook_sha256=hashlib.sha256(payload).hexdigest())
    text = json.dumps(dataclasses.asdict(stored), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Both are safely on the disk before either replaces what was there, the codebook first; a crash between the two
        # renames leaves a manifest with the hash of another codebook, which `read` refuses.
        with replacing(folder / MANIFEST) as manifest, replacing(folder / CODEBOOK) as numbers:
            write_through(numbers, payload)
            write_through(manifest, text.encode())
    except OSError as error:
        raise DataError(f"cannot save the tokenizer in {folder}: {error.strerror or error}") from error


def is_free(folder: Path) -> bool:
    """Whether nothing stands in the way of a tokenizer: a new or empty folder, a fit that was not done, one of ours."""
    if not folder.is_dir():
        return not folder.exists()
    names = {path.name for path in folder.iterdir()} - {LOCK, UNFINISHED}
    return all(fnmatch(name, PARTIAL_FILES) for name in names) or _is_ours(folder)


def _is_ours(folder: Path) -> bool:
    """Whether the manifest, or where there is none the codebook, is of a tokenizer of ours."""
    try:
        if (folder / MANIFEST).exists():
            read_manifest(folder)
        else:
            read_provenance(folder / CODEBOOK)
    except DataError:
        return False
    return True


def read_manifest(folder: Path) -> StoredTokenizer:
    """tokenizer.json of the folder. DataError where it is missing, malformed or of another format."""
    path = folder / MANIFEST
    try:
        stored = read_record(path, StoredTokenizer, version=FORMAT)
    except UnreadableFile as error:
        if not error.missing:
            raise
        raise DataError(f"{folder} holds no tokenizer: there is no {MANIFEST}{instead(folder)}") from error
    if not isinstance(stored.settings.get("vocabulary"), int):
        raise UnreadableFile(path, "its settings have no vocabulary")
    return stored


def read(folder: Path) -> tuple[StoredTokenizer, Tensor, FitReport | None]:
    """Manifest, codebook (K, F) and fit report of the folder. DataError names the file that is missing or damaged."""
    stored = read_manifest(folder)
    path, entries = folder / CODEBOOK, int(stored.settings["vocabulary"])
    most = entries * (4 * stored.features + 8) + MOST_WORDS
    size, digest = sha256_of(path, most=most)
    if digest != stored.codebook_sha256:
        what = f"its sha256 is {digest}" if digest else f"it has {size} bytes"
        raise DataError(f"{path} is damaged, or not the one of {MANIFEST}: {what}")
    examples = {"codebook": torch.empty(entries, stored.features, device="meta")}
    if stored.fit is not None:
        examples["usage_counts"] = torch.empty(entries, dtype=torch.int64, device="meta")
    tensors = read_tensors(path, {name: tuple(example.shape) for name, example in examples.items()})
    try:
        check_like(tensors, examples, "it")
        report = None if stored.fit is None else _fit_from_json(stored.fit, tensors["usage_counts"])
    except ValueError as error:
        raise DataError(f"{path} is no codebook of a tokenizer: {error}") from error
    return stored, tensors["codebook"], report


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What a codebook.safetensors says of itself: tokenizer, settings, network, source, fit, versions.

    DataError names a file that cannot be read or says nothing.
    """
    text = tensors_metadata(path).get(PROVENANCE)
    values = None if text is None else parsed_json(text, path)
    if not isinstance(values, dict):
        raise DataError(f"{path} is no codebook with its provenance")
    return values


def _provenance(stored: StoredTokenizer) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(stored).items() if name != "codebook_sha256"}


def _fit_to_json(report: FitReport) -> dict[str, Any]:
    values = {field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "usage"}
    usage = report.usage
    return {**values, "repeated": usage.repeated, "perplexity": usage.perplexity, "dead": len(usage.dead)}


def _fit_from_json(values: dict[str, Any], counts: Tensor) -> FitReport:
    """ValueError unless the values are what `_fit_to_json` makes, and counts are not negative."""
    kinds = {**get_type_hints(FitReport), "repeated": int, "perplexity": float, "dead": int}
    del kinds["usage"]
    if different := kinds.keys() ^ values.keys():
        raise ValueError(f"its fit lacks, or does not know, {', '.join(sorted(different))}")
    if counts.min() < 0:
        raise ValueError("usage_counts has negative numbers")
    kept = {name: conform(kind, values[name], f"fit.{name}") for name, kind in kinds.items()}
    usage = CodebookUsage(counts.numpy(), kept.pop("repeated"))
    del kept["perplexity"], kept["dead"]  # which follow from the counts
    if not 0 <= kept["redo"] < len(kept["objectives"]) or not all(kept["objectives"]):
        raise ValueError("fit.redo is none of fit.objectives")
    return FitReport(**kept, usage=usage)
