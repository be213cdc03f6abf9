"""Finding and reading the weights of CLIP RN50x64: a file given, a cache of this machine, or the hub."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from mapet.errors import DataError, WeightsMissingError
from mapet.files import UnreadableFile, read_pickle, read_tensors, sha256_of
from mapet.tokenizers.foreign.torchscript import is_torchscript, read_torchscript


@dataclass(frozen=True)
class HubFile:
    """A file of the hub. Its revision names a branch, whose content may change: what is pinned is the hash of the
    trunk, which is kept with every codebook and compared when that is loaded."""

    repository: str
    name: str
    revision: str = "main"


HUB_FILES = (
    HubFile("timm/resnet50x64_clip_gap.openai", "model.safetensors"),
    HubFile("timm/resnet50x64_clip.openai", "open_clip_model.safetensors"),
)
"""Files that hold the trunk; the first is the one to download. open_clip uses the second."""
OPENAI_FILE = Path("~/.cache/clip/RN50x64.pt")
"""Where OpenAI's own package, and older open_clip, keep their download."""
OPENAI_SHA256 = "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"
"""Of that file, as published in its address."""
PROBE_SECONDS = 5.0
"""The hub is asked once before a download: its own client retries for half a minute where there is no network."""


def find_clip_weights(given: str | Path | None = None) -> Path:
    """The weights file: the one given, else one in the caches of this machine, else downloaded from the hub.

    WeightsMissingError says what was looked for and how to get it.
    """
    if given is not None:
        path = at_home(given)
        if not path.is_file():
            raise WeightsMissingError(f"there is no weights file {path}; {_how_to_get_it()}")
        return path
    for file in HUB_FILES:
        cached = huggingface_hub.try_to_load_from_cache(
            file.repository, file.name, revision=file.revision, cache_dir=constants.HF_HUB_CACHE
        )
        if isinstance(cached, str):
            return Path(cached)
    if (path := at_home(OPENAI_FILE)).is_file():
        if sha256_of(path)[1] != OPENAI_SHA256:
            raise DataError(
                f"{path} is not the RN50x64.pt that OpenAI published (its SHA-256 differs): remove it, or give the "
                "weights you mean as `weights`"
            )
        return path
    return _download(HUB_FILES[0])


def at_home(path: str | Path) -> Path:
    """A path with its ~ replaced, where there is a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a safetensors file, a TorchScript archive (OpenAI's) or a torch.save file of tensors.

    No code in the file is run: TorchScript is read without loading it, torch.save files with weights_only=True.
    DataError names a file that cannot be read so.
    """
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        if is_torchscript(path):
            return read_torchscript(path)
        weights = read_pickle(path)
    except UnreadableFile as error:
        raise DataError(f"cannot read weights from {path}: {error.reason}") from error
    if isinstance(weights, Mapping):
        weights = weights.get("state_dict", weights)  # as training code saves them
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise DataError(f"{path} holds a {type(weights).__name__}, not a state dict")
    return weights


def _download(file: HubFile) -> Path:
    where = {"repo_id": file.repository, "filename": file.name, "revision": file.revision}
    missing = f"the weights of CLIP RN50x64 ({file.repository}, {file.name}) are not in the caches of this machine"
    if constants.HF_HUB_OFFLINE:
        raise WeightsMissingError(f"{missing}, and HF_HUB_OFFLINE forbids a download; {_how_to_get_it()}")
    url = huggingface_hub.hf_hub_url(**where, endpoint=constants.ENDPOINT)
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # The hub answers; its client knows better what a status means.
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise WeightsMissingError(f"{missing}, and the hub cannot be reached ({reason}); {_how_to_get_it()}") from error
    try:
        return Path(huggingface_hub.hf_hub_download(**where, endpoint=constants.ENDPOINT))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsMissingError(f"{missing}, and the download failed ({reason}); {_how_to_get_it()}") from error


def _how_to_get_it() -> str:
    file = HUB_FILES[0]
    return (
        f"where there is a network, run `hf download {file.repository} {file.name} --local-dir DIR` (about 1.5 GB), "
        "or take OpenAI's RN50x64.pt, copy the file here and give its path as `weights`; or use the tokenizer `pixel`, "
        "which needs no weights"
    )
