"""Random weights of CLIP's ModifiedResNet under OpenAI's names, for tests; the real ones are a large download."""

import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor

SMALL = {"width": 16, "layers": (1, 2, 1, 1)}
RN50X64 = {"width": 128, "layers": (3, 15, 36, 10)}


def openai_module(width: int, layers: tuple[int, ...], device: str = "meta") -> ModifiedResNet:
    """open_clip's own network, 448 pixels, as OpenAI sized it."""
    with torch.device(device):
        return ModifiedResNet(layers, output_dim=8 * width, heads=width // 2, image_size=448, width=width).eval()


def random_weights(width: int, layers: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """State dict with the prefix `visual.`: fp16 convolutions and projections, fp32 batch norm, as OpenAI stores it.

    Filled from one pool of random numbers, because 420 million fresh ones take long.
    """
    pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)).half()
    return {
        f"visual.{name}": _values(name, tuple(like.shape), pool)
        for name, like in openai_module(width, layers).state_dict().items()
    }


def _values(name: str, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    count = torch.Size(shape).numel()
    values = pool.repeat(-(-count // len(pool)))[:count].view(shape)
    if name.endswith("running_var"):
        return 1 + 0.1 * values.float().abs()
    if "bn" in name or "downsample.1" in name:
        return 0.5 + 0.1 * values.float() if name.endswith("weight") else 0.1 * values.float()
    return values * (2 / max(count / shape[0], 1)) ** 0.5
