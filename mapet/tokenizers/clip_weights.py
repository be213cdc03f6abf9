"""Finding and reading the weights of CLIP RN50x64: a file given, a cache of this machine, or the hub."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from mapet.errors import DataError, WeightsMissingError
from mapet.files import read_pickle, read_tensors, sha256_of
from mapet.tokenizers.torchscript import is_torchscript, read_torchscript

REVISION = "main"
"""Of the repositories. A branch and no commit: what holds a codebook to its weights is their hash, kept beside it."""
HUB_FILES = (
    ("timm/resnet50x64_clip_gap.openai", "model.safetensors"),
    ("timm/resnet50x64_clip.openai", "open_clip_model.safetensors"),
)
"""Repositories of the hub that hold the trunk; the first is the one to download. open_clip uses the second."""
OPENAI_FILE = Path("~/.cache/clip/RN50x64.pt")
"""Where OpenAI's own package, and older open_clip, keep their download."""
OPENAI_SHA256 = "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"
"""Of that file, as its address says."""
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
        cached = huggingface_hub.try_to_load_from_cache(
            repository, name, cache_dir=constants.HF_HUB_CACHE, revision=REVISION
        )
        if isinstance(cached, str):
            return Path(cached)
    openai = OPENAI_FILE.expanduser()
    if openai.is_file():
        found = sha256_of(openai)[1]
        if found != OPENAI_SHA256:
            raise DataError(
                f"{openai} is not OpenAI's file, or damaged: its SHA-256 is {found}, not {OPENAI_SHA256}. Remove "
                "it, or give the file to take as `weights`"
            )
        return openai
    return _download(*HUB_FILES[0])


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a safetensors file, a TorchScript archive (OpenAI's) or a torch.save file of tensors.

    No code in the file is run: TorchScript is read without loading it, torch.save files with weights_only=True.
    DataError names a file that cannot be read so.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if is_torchscript(path):
        return read_torchscript(path)
    weights = read_pickle(path)
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise DataError(f"{path} holds a {type(weights).__name__}, not a state dict of tensors")
    return weights


def _download(repository: str, name: str) -> Path:
    missing = f"the weights of CLIP RN50x64 ({repository}, {name}) are not in the caches of this machine"
    if constants.HF_HUB_OFFLINE:
        raise WeightsMissingError(f"{missing}, and HF_HUB_OFFLINE forbids a download; {_how_to_get_it()}")
    url = huggingface_hub.hf_hub_url(repository, name, revision=REVISION, endpoint=constants.ENDPOINT)
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # The hub answers; its client knows better what a status means.
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise WeightsMissingError(f"{missing}, and the hub cannot be reached ({reason}); {_how_to_get_it()}") from error
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=REVISION, endpoint=constants.ENDPOINT))
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
