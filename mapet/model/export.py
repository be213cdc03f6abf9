"""Pre-trained weights as a plain timm vision transformer, in memory or as a folder that `timm.create_model` loads.

The content stream without a mask is an ordinary vision transformer, so nothing is lost but the mask token and the
decoder. The final norm stays `norm`, applied to every token before pooling. The official fine-tuning drops it, averages
the patches, and starts a fresh `fc_norm` after that: `timm.create_model("local-dir:...", pretrained=True, fc_norm=True,
num_classes=...)` starts so too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from mapet.config import ModelConfig
from mapet.errors import CheckpointError, ConfigError, DataError, MapetError
from mapet.files import read_json, tensors_metadata, write_whole
from mapet.folders import EXPORT, PRODUCER, Staging
from mapet.model.official_names import StateDict, backbone, fuse_qkv, has_layer_scale, split_qkv
from mapet.model.streams import StreamLayout
from mapet.model.timm_folder import CONFIG, WEIGHTS
from mapet.model.vit import MaskedTokenViT

Pool = Literal["avg", "token"]

TIMM_NORM_EPS = 1e-6
"""timm's ViT norm; its config.json cannot carry another value."""
TOLERANCE = 1e-5
"""Largest difference between timm's forward and ours, relative to the largest value, in float32."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far timm's forward is from that of the pre-training network."""

    folder: Path
    architecture: str
    parameters: int
    largest_difference: float
    """Relative to the largest feature; below `TOLERANCE`."""
    dropped: tuple[str, ...]
    """Tensors that only pre-training needs."""

    @property
    def load_line(self) -> str:
        """The line of Python that loads the folder."""
        return f'timm.create_model("local-dir:{self.folder}", pretrained=True)'


def to_timm(model: ModelConfig, state_dict: StateDict, *, global_pool: Pool = "avg") -> VisionTransformer:
    """A timm vision transformer with these weights, float32, on the CPU, in eval mode.

    Args:
        model: configuration of the weights.
        state_dict: official names; a pre-training state dict or a fine-tuned classifier (`fc_norm`, `head`).
        global_pool: what `forward` returns: the mean of the patch tokens, or the class token.

    Raises CheckpointError naming tensors that are missing, unused, misshapen or not finite; ConfigError when the model
    cannot be said in timm's terms.
    """
    weights = backbone(model, state_dict)
    vit = VisionTransformer(**_timm_arguments(model, weights, global_pool))
    vit.load_state_dict(fuse_qkv(weights), strict=True)
    return vit.eval()


def from_timm(vit: VisionTransformer) -> tuple[ModelConfig, StateDict]:
    """Configuration and weights under the official names; the inverse of `to_timm`, without mask token and decoder.

    A timm model with parts that MaPeT's transformer lacks (registers, rotary positions, ...) is a CheckpointError that
    names them.
    """
    (height, width), (patch, _) = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if height != width:
        raise ConfigError(f"the model takes images of {height} x {width} pixels; mapet's models take squares")
    first = vit.blocks[0]
    model = ModelConfig(
        image_size=height,
        patch_size=patch,
        width=vit.embed_dim,
        depth=len(vit.blocks),
        heads=first.attn.num_heads,
        mlp_ratio=first.mlp.fc1.out_features / vit.embed_dim,
        class_token=vit.cls_token is not None,
        layer_scale=ModelConfig.layer_scale if hasattr(first.ls1, "gamma") else 0.0,
        norm_eps=first.norm1.eps,
    )
    return model, backbone(model, split_qkv(vit.state_dict()))


def export(
    model: ModelConfig, state_dict: StateDict, folder: str | Path, *, name: str = "mapet", global_pool: Pool = "avg"
) -> ExportReport:
    """Write `folder` for `timm.create_model("local-dir:<folder>", pretrained=True)`, and prove that it works.

    Everything is written beside `folder`, read back by timm, compared tensor by tensor and on random images with
    the pre-training network, and only then moved into place; an earlier export of ours is replaced, and nothing else.

    Args:
        name: what the weights are called in config.json (timm's pretrained tag).

    Raises MapetError (CheckpointError, ConfigError, DataError), with `folder` as it was, when anything does not fit.
    """
    folder = Path(folder)
    staging = Staging(folder, EXPORT, _files)
    try:
        staging.earlier()
    except DataError as error:
        raise ConfigError(f"cannot export: {error}") from error
    weights = backbone(model, state_dict)
    config = _timm_config(model, weights, name, global_pool)
    try:
        with staging.making() as new:
            _write(new, config, fuse_qkv(weights))
            difference = check_export(new, model, weights)
            staging.move(new)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MapetError(f"could not write the export {folder}: {reason}; nothing was changed there") from error
    return ExportReport(
        folder=folder,
        architecture=config["architecture"],
        parameters=sum(t.numel() for t in weights.values()),
        largest_difference=difference,
        dropped=tuple(n for n in state_dict if n not in weights),
    )


def check_export(folder: Path, model: ModelConfig, weights: StateDict, *, images: int = 2) -> float:
    """Load `folder` as a user would and return the largest difference of its features, relative to the largest one.

    timm itself reads the folder, so that it must have been written just now and hold nothing else. Raises
    CheckpointError naming the tensors that timm did not take as they are, or giving the difference where it is above
    `TOLERANCE`.
    """
    try:
        vit = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except RuntimeError as error:
        raise CheckpointError(f"timm cannot load the export: {error}") from error
    loaded = split_qkv(vit.state_dict())
    same = {name for name in loaded.keys() & weights.keys() if torch.equal(loaded[name], weights[name])}
    if wrong := sorted((loaded.keys() | weights.keys()) - same):
        raise CheckpointError(f"timm did not load these tensors as they were exported: {', '.join(wrong)}")
    pixels = torch.randn(images, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = content_stream(model, weights, pixels)
        pairs = [
            (vit.forward_features(pixels), features),
            (vit(pixels), _head(model, weights, features, vit.global_pool)),
        ]
    difference = max(((ours - theirs).abs().max() / ours.abs().max()).item() for theirs, ours in pairs)
    # Written so that NaN fails too.
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"timm's features differ from the model's by {difference:.2e}, at most {TOLERANCE:.0e} is allowed"
        )
    return difference


def content_stream(model: ModelConfig, weights: StateDict, pixels: Tensor) -> Tensor:
    """What the pre-training network makes of normalised pixels with nothing masked: (B, 3, S, S) -> (B, N, D).

    The content stream alone, in which every token sees every token, up to the final norm where the weights have it.
    """
    network = MaskedTokenViT(replace(model, layer_scale=1.0)).eval()
    own = network.state_dict()
    network.load_state_dict(own | {name: tensor for name, tensor in weights.items() if name in own})
    if "norm.weight" not in weights:
        network.norm = torch.nn.Identity()
    # With a cut of 0 all rows are predicted, so that all come out; the embedding takes no cut below 1.
    layout = StreamLayout(len(pixels), model.tokens, 0, target_content=True, mask_tokens=False, query_stream=False)
    order = torch.arange(model.tokens).expand(len(pixels), -1)
    x = network.embed(pixels, order, replace(layout, cut=1), normalise=False, backend="reference")
    return network.encode(x, layout, None, _full_attention).unflatten(0, (len(pixels), -1))


def _full_attention(q: Tensor, kv: Tensor, layout: StreamLayout) -> Tensor:
    k, v = (x.transpose(1, 2) for x in kv.unbind(2))  # (B, H, N, d)
    q = q.unflatten(0, (layout.batch, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def _head(model: ModelConfig, weights: StateDict, features: Tensor, global_pool: str) -> Tensor:
    pooled = features[:, 0] if global_pool == "token" else features[:, int(model.class_token) :].mean(dim=1)
    if "fc_norm.weight" in weights:
        norm = weights["fc_norm.weight"], weights["fc_norm.bias"]
        pooled = F.layer_norm(pooled, (model.width,), *norm, model.norm_eps)
    return F.linear(pooled, weights["head.weight"], weights["head.bias"]) if "head.weight" in weights else pooled


def _timm_arguments(model: ModelConfig, weights: StateDict, global_pool: Pool) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer that rebuild this model; plain JSON values."""
    if global_pool not in ("avg", "token"):
        raise ConfigError(f'global_pool is "avg" (mean of the patches) or "token" (class token), got {global_pool!r}')
    if global_pool == "token" and not model.class_token:
        raise ConfigError('global_pool "token" needs a class token and this model has none; use "avg"')
    if global_pool == "token" and "fc_norm.weight" in weights:
        raise ConfigError('these weights have fc_norm, which follows average pooling; use global_pool "avg"')
    if model.norm_eps != TIMM_NORM_EPS:
        raise ConfigError(f"a timm ViT has norm eps {TIMM_NORM_EPS}, this model has {model.norm_eps}: no export")
    return {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        # The gammas are loaded over this value; it only says that they exist.
        "init_values": (model.layer_scale or ModelConfig.layer_scale) if has_layer_scale(weights) else None,
        "class_token": model.class_token,
        "global_pool": global_pool,
        "fc_norm": "fc_norm.weight" in weights,
        "num_classes": len(weights.get("head.weight", ())),
    }


def _timm_config(model: ModelConfig, weights: StateDict, name: str, global_pool: Pool) -> dict[str, Any]:
    size = {192: "tiny", 384: "small"}.get(model.width, "base")
    arguments = _timm_arguments(model, weights, global_pool)
    return {
        **PRODUCER,
        # Any ViT name of timm's registry will do, for model_args say everything; the nearest reads best.
        "architecture": f"vit_{size}_patch16_224",
        "num_classes": arguments["num_classes"],
        "num_features": model.width,
        "global_pool": global_pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": name,
            "input_size": [3, model.image_size, model.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "num_classes": arguments["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _files(folder: Path) -> Sequence[str]:
    """The files of an export of ours; DataError where the folder holds none. The marks are in both of them."""
    marks = {CONFIG: read_json(folder / CONFIG)}
    if (folder / WEIGHTS).exists():  # it goes first when an export is removed
        marks[WEIGHTS] = tensors_metadata(folder / WEIGHTS)
    for name, values in marks.items():
        if not isinstance(values, dict) or not values.items() >= PRODUCER.items():
            raise DataError(f"{name} does not say that mapet made it")
    return WEIGHTS, CONFIG


def _write(folder: Path, config: dict[str, Any], weights: StateDict) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt", **PRODUCER})
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it private to this user; an export is to be shared
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
