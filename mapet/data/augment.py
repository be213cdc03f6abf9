"""Colour jitter on the device for a whole batch: brightness, contrast and saturation in a random order per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION = range(3)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with torchvision's digits


@dataclass(frozen=True)
class JitterDraws:
    """What was drawn for each image.

    Attributes:
        factors: float32 (b, 3), of brightness, contrast and saturation; 1 changes nothing.
        order: int64 (b, 3), the operations (0 brightness, 1 contrast, 2 saturation) in the order they are applied.
    """

    factors: Tensor
    order: Tensor

    def __len__(self) -> int:
        return len(self.factors)


def sample_color_jitter(
    batch: int, strength: float, generator: torch.Generator, device: torch.device | str
) -> JitterDraws:
    """Draw for `batch` images: factors uniform in [1 - strength, 1 + strength], orders uniform over the six.

    Args:
        strength: in [0, 1] (the paper's is 0.4).
        generator: draws happen on its device; the result is moved to `device`.
    """
    uniform = torch.rand(2, batch, 3, generator=generator, device=generator.device)
    factors = 1 + strength * (2 * uniform[0] - 1)
    return JitterDraws(factors.to(device, non_blocking=True), uniform[1].argsort(dim=1).to(device, non_blocking=True))


def color_jitter(images: Tensor, draws: JitterDraws) -> Tensor:
    """Apply the draws, each image its own, as torchvision's adjust_* functions do on float images.

    Each operation is factor * image + (1 - factor) * other, clamped to [0, 1], where other is black for brightness, the
    image's mean grey for contrast and its grey version for saturation. So the whole batch takes three vectorised
    passes, without a host sync.

    The official code jitters uint8 pictures with Pillow, which rounds after each operation: the same up to about 1/255.

    Args:
        images: uint8 (b, 3, S, S).
    Returns:
        float32 (b, 3, S, S) in [0, 1].
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (b, 3, S, S), got {images.dtype} {tuple(images.shape)}")
    if len(draws) != len(images):
        raise ValueError(f"{len(images)} images, but jitter was drawn for {len(draws)}")
    pixels = images.float().div_(255)
    for operation in draws.order.unbind(dim=1):  # (b,)
        factor = draws.factors.gather(1, operation[:, None])[:, :, None, None]  # (b, 1, 1, 1)
        operation = operation[:, None, None, None]
        red, green, blue = pixels.split(1, dim=1)
        grey = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])  # (b, 1, S, S)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        other = grey.mul_(operation == SATURATION).add_(mean * (operation == CONTRAST))
        pixels = pixels.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)
    return pixels
