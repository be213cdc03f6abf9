"""The official state-dict names: which tensors a model has, their shapes, and the two ways attention stores q, k and v.

The names are those of the official MaPeT code: pre-training models keep `attn.q` and `attn.kv` apart, timm fuses them
into `attn.qkv`, whose rows [0:D] are q and [D:3D] are kv. Fine-tuned classifiers have `fc_norm` (average pooling) or
`norm` (class token) and `head`, and neither mask token nor decoder.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from mapet.config import ModelConfig
from mapet.errors import CheckpointError, WeightsMissingError
from mapet.files import UnreadableFile, read_pickle
from mapet.model.vit import MaskedTokenViT

StateDict = dict[str, Tensor]
Shape = tuple[int, ...]

PRETRAINING_ONLY = ("mask_positional_token", "decoder.weight", "decoder.bias")
"""Tensors that pre-training needs and a vision transformer for other tasks does not."""
OFFICIAL_HEAD_SIZE = 64
"""Width of one attention head in every released model."""


def pretraining_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of a whole pre-training state dict."""
    with torch.device("meta"):
        network = MaskedTokenViT(model)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def backbone_shapes(model: ModelConfig, state_dict: StateDict) -> dict[str, Shape]:
    """Names and shapes of a vision transformer with the final norm, the layer scale and the head of these weights."""
    norm = "fc_norm" if "fc_norm.weight" in state_dict else "norm"
    shapes = {
        f"{norm}{name.removeprefix('norm')}" if name.startswith("norm.") else name: shape
        for name, shape in pretraining_shapes(model).items()
        if name not in PRETRAINING_ONLY and (has_layer_scale(state_dict) or not name.endswith(".gamma"))
    }
    if "head.weight" in state_dict:
        classes = state_dict["head.weight"].shape[0]
        shapes |= {"head.weight": (classes, model.width), "head.bias": (classes,)}
    return shapes


def backbone(model: ModelConfig, state_dict: StateDict) -> StateDict:
    """The tensors of a vision transformer, float32, on the CPU: everything but `PRETRAINING_ONLY`.

    Takes pre-training weights and fine-tuned classifiers alike. Raises CheckpointError, naming the tensors, when one is
    missing, has no place in the model, has another shape, or holds NaN or infinity.
    """
    expected = backbone_shapes(model, state_dict)
    kept = {name: tensor for name, tensor in state_dict.items() if name not in PRETRAINING_ONLY}
    problems = [
        _listing("missing", [name for name in expected if name not in kept]),
        _listing("not used by this model", [name for name in kept if name not in expected]),
        _listing(
            "of another shape",
            [
                f"{name} is {tuple(kept[name].shape)}, must be {shape}"
                for name, shape in expected.items()
                if name in kept and tuple(kept[name].shape) != shape
            ],
        ),
        _listing("with NaN or infinity", [n for n, t in kept.items() if not bool(torch.isfinite(t).all())]),
    ]
    if found := [problem for problem in problems if problem]:
        raise CheckpointError(f"these weights do not fit the model {model}: {'; '.join(found)}")
    return {name: kept[name].detach().to("cpu", torch.float32) for name in expected}


def has_layer_scale(state_dict: StateDict) -> bool:
    """Whether the blocks scale their branches by learned `gamma` vectors; every official model does."""
    return any(name.endswith(".ls1.gamma") for name in state_dict)


def _listing(what: str, names: list[str], limit: int = 8) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {what}: {', '.join(names[:limit])}{rest}"


def fuse_qkv(state_dict: StateDict) -> StateDict:
    """Official names to timm's: `attn.q` over `attn.kv` become one `attn.qkv`."""
    fused = {}
    for name, tensor in state_dict.items():
        if ".attn.q." in name:
            keys_values = state_dict[name.replace(".attn.q.", ".attn.kv.")]
            fused[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([tensor, keys_values])
        elif ".attn.kv." not in name:
            fused[name] = tensor
    return fused


def split_qkv(state_dict: StateDict) -> StateDict:
    """timm's names to the official ones: the inverse of `fuse_qkv`."""
    split = {}
    for name, tensor in state_dict.items():
        if ".attn.qkv." in name:
            width = tensor.shape[0] // 3
            split[name.replace(".attn.qkv.", ".attn.q.")] = tensor[:width].clone()
            split[name.replace(".attn.qkv.", ".attn.kv.")] = tensor[width:].clone()
        else:
            split[name] = tensor
    return split


def infer_model_config(state_dict: StateDict, *, head_size: int = OFFICIAL_HEAD_SIZE) -> ModelConfig:
    """The configuration that tensors of the official names imply; only the head size cannot be read from them."""
    needed = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in state_dict]:
        raise CheckpointError(f"not a vision transformer with the official names: {', '.join(missing)} missing")
    width, _, patch, _ = state_dict["patch_embed.proj.weight"].shape
    class_token = "cls_token" in state_dict
    grid = math.isqrt(state_dict["pos_embed"].shape[1] - int(class_token))
    decoder = state_dict.get("decoder.weight")
    return ModelConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks.")),
        heads=max(1, width // head_size),
        mlp_ratio=state_dict["blocks.0.mlp.fc1.weight"].shape[0] / width,
        class_token=class_token,
        layer_scale=ModelConfig.layer_scale if has_layer_scale(state_dict) else 0.0,
        vocabulary=ModelConfig.vocabulary if decoder is None else decoder.shape[0],
    )


def load_released(path: str | Path) -> tuple[ModelConfig, StateDict]:
    """Read a checkpoint as the official code writes it (timm's CheckpointSaver), such as the six released classifiers.

    The file is a pickle with an `argparse.Namespace`; it is read with `weights_only=True` and that one class allowed,
    so no code in it can run. A leading "module." of the names is dropped.
    Raises WeightsMissingError without a file, CheckpointError when it is not such a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsMissingError(f"no file {path}; the released classifiers are vit_standard_*_patch16_224_*.tar")
    try:
        content = read_pickle(path, classes=[argparse.Namespace])
    except UnreadableFile as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than weights and is refused: {error.reason}"
        ) from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise CheckpointError(f"{path} has no 'state_dict' of tensors; expected a checkpoint of timm's CheckpointSaver")
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    try:
        return infer_model_config(weights), weights
    except (ValueError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{path} holds no vision transformer with the official names: {error}") from error
