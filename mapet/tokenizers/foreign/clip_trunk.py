"""The convolutional trunk of CLIP's ModifiedResNet, by timm, from weights under any of their usual names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import timm
import torch
from timm.models.byobnet import ByoBlockCfg, checkpoint_filter_fn
from torch import Tensor, nn

from mapet.errors import DataError

STRIDE = 32
"""Input pixels per feature, along one side."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TrunkConfig:
    """Sizes of a ModifiedResNet. The defaults are RN50x64, the trunk of k-CLIP: 365,034,176 parameters."""

    width: int = 128
    layers: tuple[int, ...] = (3, 15, 36, 10)

    @property
    def features(self) -> int:
        """Channels of the last stage."""
        return 32 * self.width


def build_trunk(config: TrunkConfig, device: torch.device | str | None = None) -> nn.Module:
    """The trunk in evaluation mode. `forward_features` maps (b, 3, 32 g, 32 g) to (b, F, g, g), after its last ReLU."""
    width = config.width
    blocks = tuple(
        ByoBlockCfg(type="bottle", d=depth, c=4 * width * 2**i_stage, s=1 if i_stage == 0 else 2, gs=0, br=0.25)
        for i_stage, depth in enumerate(config.layers)
    )
    trunk = timm.create_model(
        "resnet50x64_clip_gap",
        blocks=blocks,
        stem_chs=(width // 2, width // 2, width),
        width_factor=1.0,
        device=device,
    )
    return trunk.requires_grad_(False).eval()


def trunk_from_weights(weights: Mapping[str, Tensor], source: str) -> tuple[TrunkConfig, nn.Module]:
    """The trunk that the weights describe, in fp32 on the CPU.

    Accepts OpenAI's and open_clip's names (with or without `visual.`, `module.` or `state_dict`) and timm's. Text tower
    and attention pool are left out. `source` is what errors call the weights; DataError if they are of another network.
    """
    state = _trunk_state(weights)
    config = _config_of(state, source)
    trunk = build_trunk(config, device="meta")
    expected = trunk.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    unknown = [name for name in state if name not in expected]
    for problem, names in (("misses", missing), ("has the wrong shape of", wrong), ("has the unknown", unknown)):
        if names:
            raise DataError(f"{source} is no CLIP ModifiedResNet: it {problem} {_some(names)}")
    counter = torch.zeros((), dtype=torch.int64)
    filled = {name: state[name].float() if name in state else counter for name in expected}
    trunk.load_state_dict(filled, assign=True)
    return config, trunk.requires_grad_(False).eval()


def hash_of_trunk(trunk: nn.Module) -> str:
    """SHA-256 of all weights and batch-norm statistics as fp32: the same for one network stored in fp16 or fp32."""
    digest = hashlib.sha256()
    for name, values in sorted(trunk.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(values.shape)}\n".encode())
            digest.update(values.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def _trunk_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk's tensors under timm's names."""
    weights = weights.get("state_dict", weights)
    state = {name.removeprefix("module."): values for name, values in weights.items() if isinstance(values, Tensor)}
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        state = {f"visual.{name}": values for name, values in state.items()}
    if "visual.conv1.weight" in state:
        # timm's filter renames attention-pool keys only for a model that has one, and drops the text tower.
        state = checkpoint_filter_fn(state, nn.ModuleDict({"head": nn.Identity()}))
    return {
        name: values
        for name, values in state.items()
        if not name.startswith(("head.", "visual.")) and not name.endswith("num_batches_tracked")
    }


def _config_of(state: Mapping[str, Tensor], source: str) -> TrunkConfig:
    blocks = {tuple(map(int, found.groups())) for name in state if (found := re.match(r"stages\.(\d+)\.(\d+)\.", name))}
    depths = [1 + max((block for stage, block in blocks if stage == i_stage), default=-1) for i_stage in range(4)]
    stem = state.get("stem.conv3.conv.weight")
    if stem is None or stem.dim() != 4 or stem.shape[0] % 8 or not all(depths):
        raise DataError(
            f"{source} is no CLIP ModifiedResNet (RN50x64 and its smaller kin): its tensors are {_some(list(state))}"
        )
    return TrunkConfig(stem.shape[0], tuple(depths))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
