"""k-CLIP (MaPeT, section 4.2): k-means over the features of CLIP RN50x64 before its attention pooling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from mapet.config import Precision
from mapet.errors import ConfigError
from mapet.tokenizers.base import Network
from mapet.tokenizers.foreign.clip_trunk import MEAN, STD, STRIDE, hash_of_trunk, trunk_from_weights
from mapet.tokenizers.foreign.clip_weights import find_clip_weights, read_weights
from mapet.tokenizers.kmeans import KMeansTokenizer
from mapet_kernels.precision import full_fp32

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device: torch.device) -> Precision:
    """That of the official code: fp16 on a GPU, else fp32."""
    return "fp16" if device.type == "cuda" else "fp32"


class KClipTokenizer(KMeansTokenizer):
    """A patch is the feature of the trunk's last stage at its place: 4096 non-negative numbers for RN50x64.

    The image is seen at 32 pixels per patch (448 for the paper's 14 x 14 patches), in CLIP's own preparation: shorter
    side to that size, bicubic, centre crop.

    Args:
        precision: of the convolutions; batch norm, k-means and codebook are fp32. Where it is None it is that of the
            official code: fp16 on a GPU, else fp32. It changes tokens near the border of two entries, so it is kept
            with the codebook.
        weights: file with CLIP RN50x64 (or a smaller ModifiedResNet); caches and hub when not given.

    Raises:
        WeightsMissingError: no weights given, cached or downloadable; the text says how to get them.
        DataError: the weights file is damaged or of another network.
    """

    name, has_network = "kclip", True

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        vocabulary: int = 8192,
        device: str | torch.device = "cpu",
        *,
        precision: Precision | None = None,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(image_size, patch_size, vocabulary, device)
        precision = precision or default_precision(self.device)
        if precision not in DTYPES:
            raise ConfigError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
        self.precision = precision
        path = find_clip_weights(weights)
        self.trunk_config, trunk = trunk_from_weights(read_weights(path), str(path))
        self._network = Network(
            architecture=f"CLIP ModifiedResNet, width {self.trunk_config.width}, layers {self.trunk_config.layers}",
            sha256=hash_of_trunk(trunk),
            source=str(path),
        )
        # Channels last: the layout of the fast convolutions, and a feature is contiguous at the end.
        self.trunk = _with_convolutions_in(trunk, DTYPES[precision]).to(self.device, memory_format=torch.channels_last)
        self._forward = self.trunk.forward_features
        self._compiled_batch = 0
        self._mean = torch.tensor(MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(STD, device=self.device).view(3, 1, 1)

    @property
    def input_size(self) -> int:
        return STRIDE * self.grid

    @property
    def feature_size(self) -> int:
        return self.trunk_config.features

    @property
    def network(self) -> Network:
        return self._network

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "precision": self.precision}

    def prepare(self, image: Image.Image) -> Tensor:
        resized = TF.resize(image.convert("RGB"), self.input_size, InterpolationMode.BICUBIC)
        return TF.pil_to_tensor(TF.center_crop(resized, self.input_size))

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compiled_batch > 0

    def compile(self, batch_size: int) -> None:
        """Compile the trunk for batches of this size; smaller ones are filled up, so that it is compiled once only."""
        self._compiled_batch = batch_size
        self._forward = torch.compile(self.trunk.forward_features, dynamic=False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        count = len(images)
        if count < self._compiled_batch:
            images = torch.cat([images, images[:1].expand(self._compiled_batch - count, -1, -1, -1)])
        inputs = (images.float() / 255 - self._mean) / self._std
        # cuDNN would use TF32 for fp32 convolutions unless told not to, and tokens near a border would flip.
        with full_fp32(self.device.type):
            inputs = inputs.to(DTYPES[self.precision], memory_format=torch.channels_last)
            maps = self._forward(inputs)
        # (b, F, rows, columns), channels last in memory -> (b, rows * columns, F) without a copy
        return maps[:count].permute(0, 2, 3, 1).flatten(1, 2)


def _with_convolutions_in(trunk: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Only the convolutions change precision: fp16 is too narrow for the statistics of batch norm."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    return trunk
