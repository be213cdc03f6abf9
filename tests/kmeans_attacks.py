"""Rows and centroids that break a careless argmin in 16 bits: what the backends with an error bound are tested with."""

from __future__ import annotations

import torch
from test_kmeans import ADVERSARIAL, near_ties, randn
from torch import Tensor


def relu(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).relu()


FINE = 2.0**-20
ATTACKS = {
    **{
        name: lambda make=make: tuple(v.float()[:36] for v in make())
        for name, make in ADVERSARIAL.items()
        if "float64" not in name and name != "near ties, long rows"
    },
    "float16, plain": lambda: (randn(36, 64).half(), randn(50, 64, seed=1).half()),
    "float16 rows, float32 centroids": lambda: (relu(36, 64).half(), relu(50, 64, seed=1)),
    "float16, one feature": lambda: (randn(36, 1).half(), randn(50, 1, seed=1).half()),
    "float16, post-ReLU like CLIP's": lambda: (relu(20, 2048).half(), relu(40, 2048, seed=1)),
    "float16, large common offset": lambda: ((randn(36, 32) + 1000).half(), (randn(50, 32, seed=1) + 1000).half()),
    "float16, huge": lambda: ((randn(36, 32) * 15000).half(), randn(50, 32, seed=1) * 15000),
    "float16, subnormal": lambda: ((randn(36, 32) * 1e-6).half(), (randn(50, 32, seed=1) * 1e-6).half()),
    "float16, near ties below its digits": lambda: tuple(v.half() for v in near_ties(36, 64, 1e-4)),
    "float16, midpoints": lambda: (((c := randn(24, 32).half())[:-1] + c[1:]) / 2, c),
    "tiny rows, huge centroids": lambda: (randn(30, 16) * 1e-30, randn(20, 16, seed=1) * 1e30),
    "huge rows, tiny centroids": lambda: (randn(30, 16) * 1e30, randn(20, 16, seed=1) * 1e-30),
    "zero rows": lambda: (torch.zeros(9, 16), randn(20, 16, seed=1)),
    "all centroids equal": lambda: (randn(9, 16), torch.ones(20, 16)),
    "centroids a few float32 steps apart": lambda: (randn(30, 16), 1 + FINE * randn(20, 16, seed=1)),
}


def cut_off_attack(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs of centroids at one distance but for a little; cutting off costs one more than the other.

    Of a pair, the first has large products of one sign first, the second has them last.
    """
    features = 512
    row = torch.ones(40, features) + 0.001 * randn(40, features)
    first = torch.full((20, features), 1.0 + 2.0**-9) + 0.01 * randn(20, features, seed=1)
    second = first.flip(1) + 2.0**-13 * randn(20, features, seed=2)
    return row.to(dtype), torch.cat([first, -first, second, -second])
