"""A vision transformer out of a folder in timm's layout, read by us: timm would also take pickles, and run them.

config.json         architecture, a name in timm's registry, and model_args, plain values
model.safetensors   the weights under timm's names
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer

from mapet.checked import Range, above, at_least, conform, fraction
from mapet.errors import CheckpointError
from mapet.files import UnreadableFile, one_line, read_json, read_tensors

CONFIG, WEIGHTS, PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"

Size = Annotated[int, at_least(1, 2**16)]
Sizes = Size | tuple[Size, Size]
Rate = Annotated[float, fraction(one=False)]
ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("img_size", "patch_size"), Sizes),
    **dict.fromkeys(("embed_dim", "num_heads"), Size),
    "in_chans": Literal[3],
    "depth": Annotated[int, at_least(1, 1000)],
    "num_classes": Annotated[int, at_least(0, 2**24)],
    "mlp_ratio": Annotated[float, above(0, 1000)],
    "init_values": Annotated[float, Range(0)] | None,
    "reg_tokens": Annotated[int, at_least(0, 1000)],
    "global_pool": Literal["", "avg", "avgmax", "max", "token"],
    "pos_embed": Literal["", "none", "learn"],
    **dict.fromkeys(("qkv_bias", "qk_norm", "class_token", "no_embed_class", "pre_norm", "final_norm"), bool),
    **dict.fromkeys(("pool_include_prefix", "dynamic_img_size", "dynamic_img_pad", "proj_bias"), bool),
    "fc_norm": bool | None,
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), Rate),
    "patch_drop_rate": Rate,
}
"""Arguments of timm's VisionTransformer that a folder may name. All are plain values, and none names a file."""


def is_timm_folder(folder: Path) -> bool:
    """Whether config.json in the folder is timm's, not a checkpoint's. UnreadableFile where it cannot be read."""
    try:
        config = read_json(folder / CONFIG)
    except UnreadableFile as error:
        if error.missing or not (folder / CONFIG).is_file():
            return False
        raise
    return isinstance(config, dict) and "architecture" in config


def read_timm_folder(folder: Path) -> VisionTransformer:
    """The model, in float32 on the CPU, in eval mode. CheckpointError says what the folder lacks or what is wrong."""
    config = read_json(folder / CONFIG)
    try:
        name, arguments = _described(config)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model that can be read: {one_line(error)}") from error
    try:
        with torch.device("meta"):  # sizes that somebody made up take no memory
            model = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # whatever timm makes of values that do not go together
        raise CheckpointError(f"timm makes no {name} of {folder / CONFIG}: {one_line(error)}") from error
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise CheckpointError(
            f"{folder} has its weights in {PICKLE}, a pickle, which may run code and is not read; save as {WEIGHTS}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = read_tensors(folder / WEIGHTS, shapes, floating=True)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{folder / WEIGHTS} holds NaN or infinity in {broken[0]}")
    return model.eval()


def _described(config: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the model; ValueError for any that we do not know."""
    config = conform(dict[str, Any], config, "it")
    name = conform(str, config.get("architecture"), "architecture")
    # A name with a scheme would make timm fetch, or read, something else.
    if not timm.is_model(name) or not is_model_in_modules(name.split(".")[0], ["vision_transformer"]):
        raise ValueError(f"architecture {name!r} is no vision transformer of timm's registry")
    given = conform(dict[str, Any], config.get("model_args") or {}, "model_args")
    given = {name: config[name] for name in ("num_classes", "global_pool") if name in config} | given
    if unknown := sorted(given.keys() - ARGUMENTS.keys()):
        raise ValueError(f"model_args has {unknown[0]!r}, which is not read; known are {', '.join(ARGUMENTS)}")
    return name, {name: conform(ARGUMENTS[name], value, f"model_args.{name}") for name, value in given.items()}
