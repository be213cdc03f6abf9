"""Frozen features of every block, as the linear probe of the paper reads them, kept on disk where asked.

The feature of block i is concat(class token, mean of the patch tokens) of its output, without the final norm; without a
class token it is the mean alone (the paper follows BEiT's linear evaluation).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.errors import CheckpointError, DataError
from mapet.evaluate.images import Images, as_tensor
from mapet.files import UnreadableFile, map_array, read_record, replacing, write_whole

Layers = Literal["all", "last"]
FORMAT = 2


@dataclass(frozen=True)
class Features:
    """Features of n images from L layers."""

    values: np.ndarray
    """(n, L, F) float32, in memory or mapped from a file."""
    layers: tuple[str, ...]
    """Names of the L layers, first to last."""

    def __len__(self) -> int:
        return len(self.values)

    def layer(self, i: int) -> np.ndarray:
        """(n, F) of one layer; -1 is the last."""
        return self.values[:, i]

    def take(self, ids: np.ndarray) -> Features:
        """The features of some of the images."""
        return Features(self.values[ids], self.layers)


@dataclass(frozen=True)
class FeatureKey:
    """Everything that cached features depend on."""

    weights: str
    images: str
    layers: Layers
    count: int
    format: int = FORMAT

    def digest(self) -> str:
        """Short name for a file."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:16]


def extract_features(
    model: VisionTransformer, images: Images, *, layers: Layers = "all", batch_size: int = 256
) -> Features:
    """Features of a timm vision transformer, on the device it is on, in float32, eval mode, without gradients.

    Args:
        images: uint8 (n, 3, S, S) with S the model's image size; see `mapet.evaluate.images`.
        layers: every block, or the last one only.

    Raises DataError when there are no images or they have another size, CheckpointError when a feature is not finite.
    """
    values = np.empty(_shape(model, len(images), layers), np.float32)
    for start, batch in _feature_batches(model, images, layers, batch_size):
        values[start : start + len(batch)] = batch
    return Features(values, _layer_names(model, layers))


def pixel_features(images: Images, *, batch_size: int = 1024) -> Features:
    """The pixels themselves as features, in [0, 1]: the baseline that has learned nothing. (n, 1, 3*S*S)."""
    if not len(images):
        raise DataError("there are no images to evaluate on")
    values = [as_tensor(images[i : i + batch_size]).flatten(1).cpu().numpy() for i in range(0, len(images), batch_size)]
    return Features(np.concatenate(values)[:, None].astype(np.float32) / 255, ("pixels",))


def cached_features(
    folder: str | Path,
    model: VisionTransformer,
    images: Images,
    *,
    fingerprint: str,
    layers: Layers = "all",
    batch_size: int = 256,
) -> Features:
    """As `extract_features`, computed once per (weights, images, layers) and then read from `folder`, memory-mapped.

    Args:
        fingerprint: text that changes when the images do.

    Raises DataError, naming the file and what differs, when a cached file is damaged or is not what its name says.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    key = FeatureKey(hashlib.sha256(safetensors.torch.save(weights)).hexdigest(), fingerprint, layers, len(images))
    path = Path(folder) / f"features_{key.digest()}.npy"
    if not path.exists():
        _write_cache(path, key, model, images, batch_size)
    advice = f"delete {path.name} and {path.with_suffix('.json').name} in {path.parent} to compute them again"
    try:
        found = read_record(path.with_suffix(".json"), FeatureKey)
        values = map_array(path)
    except UnreadableFile as error:
        raise DataError(f"cached features {path} cannot be read ({error.reason}); {advice}") from error
    if stale := [name for name, wanted in dataclasses.asdict(key).items() if getattr(found, name) != wanted]:
        raise DataError(f"cached features {path} were made from other {', '.join(stale)}; {advice}")
    shape = _shape(model, key.count, key.layers)
    if values.shape != shape or values.dtype != np.float32:
        raise DataError(f"cached features {path} are {values.dtype} {values.shape}, must be float32 {shape}; {advice}")
    return Features(values, _layer_names(model, key.layers))


def _write_cache(path: Path, key: FeatureKey, model: VisionTransformer, images: Images, batch_size: int) -> None:
    """Stream the features into a file beside `path` and rename it when it is whole."""
    header = {"descr": "<f4", "fortran_order": False, "shape": _shape(model, len(images), key.layers)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written, not mapped: a full disk is an error when it is written to, and a crash when it is mapped.
        with replacing(path) as partial, partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _, batch in _feature_batches(model, images, key.layers, batch_size):
                file.write(np.ascontiguousarray(batch, dtype="<f4").data)
            file.flush()
            write_whole(path.with_suffix(".json"), json.dumps(dataclasses.asdict(key), indent=2) + "\n")
    except OSError as error:
        raise DataError(f"could not write cached features {path}: {error.strerror or error}") from error


def _feature_batches(
    model: VisionTransformer, images: Images, layers: Layers, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """First id and features (b, L, F) of one batch of images after the other."""
    count, training = len(_layer_names(model, layers)), model.training
    model.eval()
    try:
        for start in range(0, len(images), batch_size):
            features = _block_features(model, as_tensor(images[start : start + batch_size]), count)
            if not bool(torch.isfinite(features).all()):
                ids = f"{start} to {start + len(features) - 1}"
                raise CheckpointError(f"features of images {ids} are not finite: the weights have diverged")
            yield start, features.cpu().numpy()
    finally:
        model.train(training)


@torch.inference_mode()
def _block_features(model: VisionTransformer, images: Tensor, count: int) -> Tensor:
    """uint8 (b, 3, S, S) -> (b, count, F): features of the last `count` blocks."""
    if tuple(images.shape[2:]) != tuple(model.patch_embed.img_size):
        size, wanted = images.shape[-1], model.patch_embed.img_size[0]
        raise DataError(f"images are {size} x {size} pixels, the model takes {wanted} x {wanted}")
    device = next(model.parameters()).device
    mean, std = (torch.tensor(c, device=device).view(3, 1, 1) for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    outputs = model.forward_intermediates(
        (images.to(device).float() / 255 - mean) / std,
        indices=count,
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    if model.cls_token is None:
        return torch.stack([patches.mean(dim=1) for patches in outputs], dim=1)
    return torch.stack([torch.cat([prefix[:, 0], patches.mean(dim=1)], dim=-1) for patches, prefix in outputs], dim=1)


def _shape(model: VisionTransformer, count: int, layers: Layers) -> tuple[int, int, int]:
    if not count:
        raise DataError("there are no images to evaluate on")
    width = model.embed_dim * (1 if model.cls_token is None else 2)
    return count, len(_layer_names(model, layers)), width


def _layer_names(model: VisionTransformer, layers: Layers) -> tuple[str, ...]:
    names = tuple(f"block {i + 1}" for i in range(len(model.blocks)))
    return names if layers == "all" else names[-1:]
