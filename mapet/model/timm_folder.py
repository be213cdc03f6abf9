"""Reading a folder of a timm vision transformer, such as `mapet export` writes, without handing the folder to timm.

timm reads whatever weights it finds in a folder, pickles too, and some of its versions run the code in these. Here
only config.json and model.safetensors are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from mapet.checked import above, at_least, conform, shown
from mapet.errors import CheckpointError
from mapet.files import UnreadableFile, one_line, read_record, read_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class TimmArguments:
    """The arguments of timm's VisionTransformer that a config.json may give: plain values of a sane size.

    One that is not given is that of the architecture.
    """

    img_size: Annotated[int | None, at_least(1, 16384)] = None
    patch_size: Annotated[int | None, at_least(1, 16384)] = None
    embed_dim: Annotated[int | None, at_least(1, 65536)] = None
    depth: Annotated[int | None, at_least(1, 1024)] = None
    num_heads: Annotated[int | None, at_least(1, 1024)] = None
    mlp_ratio: Annotated[float | None, above(0, 64)] = None
    num_classes: Annotated[int | None, at_least(0, 2**20)] = None
    reg_tokens: Annotated[int | None, at_least(0, 1024)] = None
    init_values: float | None = None
    global_pool: Literal["", "avg", "token"] | None = None
    class_token: bool | None = None
    fc_norm: bool | None = None
    pre_norm: bool | None = None
    final_norm: bool | None = None
    qk_norm: bool | None = None
    qkv_bias: bool | None = None
    proj_bias: bool | None = None
    no_embed_class: bool | None = None


def is_timm_folder(path: Path) -> bool:
    """Whether config.json in the folder is timm's, not a checkpoint's."""
    try:
        return "architecture" in read_record(path / CONFIG, dict[str, Any])
    except UnreadableFile:
        return False


def read_timm_folder(folder: Path) -> VisionTransformer:
    """The vision transformer in a folder, float32, on the CPU, in eval mode.

    CheckpointError names what is missing or damaged, or that it is another network.
    """
    try:
        model = _without_weights(read_record(folder / CONFIG, dict[str, Any]))
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        weights = read_tensors(folder / WEIGHTS, shapes, finite=True)
    except UnreadableFile as error:
        raise CheckpointError(f"{error}{_advice(folder, error)}") from error
    except ValueError as error:
        raise CheckpointError(f"no model can be made of {folder / CONFIG}: {error}") from error
    model.load_state_dict(weights, assign=True)
    return model.float().eval()


def _without_weights(config: dict[str, Any]) -> VisionTransformer:
    """The network that a config.json describes, on the meta device, so that its size costs nothing. ValueError."""
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):  # which prefixes of places to load from are not
        raise ValueError(f"its architecture {shown(name)} is no model of timm's")
    given = {part: config[part] for part in ("num_classes", "global_pool") if part in config}
    given |= conform(dict[str, Any], config.get("model_args", {}), "model_args")
    arguments = vars(conform(TimmArguments, given, "model_args"))
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # of networks with other arguments, or of sizes that do not go together
        raise ValueError(f"timm cannot make a {name} of its model_args: {one_line(error)}") from error
    if not isinstance(model, VisionTransformer) or list(model.named_buffers()):
        raise ValueError(f"it describes a {type(model).__name__}, and only vision transformers can be read")
    return model


def _advice(folder: Path, error: UnreadableFile) -> str:
    """What to do where there are weights, but not in the file they should be in."""
    if not error.missing or error.path.name != WEIGHTS:
        return ""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return ""
    return f"; {pickles[0]} is a pickle, which could run code, and is not read: save the weights as {WEIGHTS}"
