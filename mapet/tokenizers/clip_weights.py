"""Finding and reading the weights of CLIP RN50x64: a file given, a cache of this machine, or the hub."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from torch import Tensor

from mapet.errors import DataError, WeightsMissingError
from mapet.tokenizers.torchscript import is_torchscript, read_torchscript

HUB_FILES = (
    ("timm/resnet50x64_clip_gap.openai", "model.safetensors"),
    ("timm/resnet50x64_clip.openai", "open_clip_model.safetensors"),
)
"""Repositories of the hub that hold the trunk; the first is the one to download. open_clip uses the second."""
OPENAI_FILE = Path("~/.cache/clip/RN50x64.pt")
"""Where OpenAI's own package, and older open_clip, keep their download."""
PROBE_SECONDS = 5.0
"""The hub is asked once before a download: its own client retries for half a minute where there is no network."""


def find_clip_weights(given: str | Path | None = None) -> Path:
    """The weights file: the one given, else one in the caches of this machine, else downloaded from the hub.

    WeightsMissingError says what was looked for and how to get it.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise WeightsMissingError(f"there is no weights file {path}; {_how_to_get_it()}")
        return path
    for repository, name in HUB_FILES:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=constants.HF_HUB_CACHE)
        if isinstance(cached, str):
            return Path(cached)
    if OPENAI_FILE.expanduser().is_file():
        return OPENAI_FILE.expanduser()
    return _download(*HUB_FILES[0])


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a safetensors file, a TorchScript archive (OpenAI's) or a torch.save file of tensors.

    No code in the file is run: TorchScript is read without loading it, torch.save files with weights_only=True.
    DataError names a file that cannot be read so.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # A damaged file fails in as many ways as it has bytes.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"cannot read weights from {path}: {reason}") from error
    if not isinstance(weights, Mapping):
        raise DataError(f"{path} holds a {type(weights).__name__}, not a state dict")
    return weights


def _download(repository: str, name: str) -> Path:
    missing = f"the weights of CLIP RN50x64 ({repository}, {name}) are not in the caches of this machine"
    if constants.HF_HUB_OFFLINE:
        raise WeightsMissingError(f"{missing}, and HF_HUB_OFFLINE forbids a download; {_how_to_get_it()}")
    url = huggingface_hub.hf_hub_url(repository, name, endpoint=constants.ENDPOINT)
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # The hub answers; its client knows better what a status means.
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise WeightsMissingError(f"{missing}, and the hub cannot be reached ({reason}); {_how_to_get_it()}") from error
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, endpoint=constants.ENDPOINT))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsMissingError(f"{missing}, and the download failed ({reason}); {_how_to_get_it()}") from error


def _how_to_get_it() -> str:
    repository, name = HUB_FILES[0]
    return (
        f"where there is a network, run `hf download {repository} {name} --local-dir DIR` (about 1.5 GB), or take "
        f"OpenAI's RN50x64.pt, copy the file here and give its path as `weights`; or use the tokenizer `pixel`, "
        f"which needs no weights"
    )
