"""How fast a device could be at best: what an op has to compute and move, and the rates this device reaches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.timing import Clock
from mapet_kernels.registry import REGISTRY, TwoStreamShape

BACKWARD_PRODUCTS = 2.5
"""Matrix products over the visible pairs, backward to forward: Q K^T once more, dO V^T, P^T dO, dS K and dS^T Q are
five, Q K^T and P V are two."""


@dataclass(frozen=True)
class Cost:
    """What a pass must do at least: floating-point operations, and bytes to or from device memory."""

    flop: float
    bytes: int

    def seconds(self, rates: Rates, dtype: str) -> float:
        """The least time on a device with these rates: the larger of arithmetic and traffic."""
        return max(self.flop / rates.flop_per_second[dtype], self.bytes / rates.bytes_per_second)


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do: bytes read plus bytes written of a copy, and matrix products by dtype."""

    bytes_per_second: float
    flop_per_second: dict[str, float]


def by_phase(forward: Cost, backward: Cost) -> dict[str, Cost]:
    """Both passes, and one after the other."""
    both = Cost(forward.flop + backward.flop, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}


def costs(shape: TwoStreamShape, dtype: torch.dtype) -> dict[str, Cost]:
    """Cost of two-stream attention with one cut for all images, by pass.

    Forward, from the registry: Q, K and V read once, O written once. Backward: Q, K, V, O, dO and the fp32 log-sum-exp
    read once, dQ, dK and dV written once, that is twice the forward bytes and the log-sum-exp.
    """
    flop, moved = REGISTRY["two_stream_attention"].cost(shape, dtype)
    keys = shape.tokens + (shape.targets if shape.mask_tokens else 0)
    rows = shape.targets + (keys if shape.with_content else 0)
    heads = shape.batch * shape.heads
    more = 4 * heads * (rows + keys) * shape.size * dtype.itemsize + 4 * heads * rows
    return by_phase(Cost(flop, moved), Cost(BACKWARD_PRODUCTS * flop, more))


def measure(device: torch.device, dtypes: dict[str, torch.dtype], clock: Clock, repeats: int = 10) -> Rates:
    """Rates of a large copy and of square matrix products of random data: the best of the repeats, as a ceiling is."""
    large = device.type == "cuda"
    source = torch.randn((2 << 30 if large else 64 << 20) // 4, device=device)
    target = torch.empty_like(source)
    copy = [clock.time(lambda: target.copy_(source))[1] for _ in range(repeats)]
    size = 8192 if large else 768
    rates = {}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = [clock.time(lambda a=a, b=b: a @ b)[1] for _ in range(repeats)]
        rates[name] = 2 * size**3 / min(product[1:])
    return Rates(2 * source.numel() * 4 / min(copy[1:]), rates)
