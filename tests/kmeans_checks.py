"""What the tests of k-means share: rows that break a careless argmin, the float64 truth, and every way to assign."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import emulation
import pytest
import torch
from op_checks import poisoned
from torch import Tensor

from mapet_kernels import kmeans_assign, launch
from mapet_kernels.backends import INTERPRETED, reason_against_listed
from mapet_kernels.kmeans_assign import passes
from mapet_kernels.launch import AssignConfig

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
POINTERS = AssignConfig(32, 16, 32, warps=4, stages=2, descriptors=False, capacity=4)
DESCRIPTORS = AssignConfig(32, 32, 16, warps=4, stages=2, descriptors=True, capacity=2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relu(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).relu()


def all_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """(n, K) float64 squared distances from the differences, of values scaled by an exact power of two."""
    largest = max(x.abs().max().item(), centroids.abs().max().item())
    half = 2.0 ** -(math.frexp(largest)[1] // 2)
    x, centroids = (values.double().cpu() * half * half for values in (x, centroids))
    return torch.stack([(x - centroid).square().sum(1) for centroid in centroids], dim=1)


def assert_float64_argmin(ids: Tensor, x: Tensor, centroids: Tensor) -> None:
    """Each id is the float64 argmin; a row tied to float64 rounding may hold any of the tied ids."""
    distances = all_distances(x, centroids)
    chosen = distances.gather(1, ids.cpu()[:, None]).squeeze(1)
    smallest = distances.min(1).values
    rounding = 4 * x.shape[1] * 2.0**-53
    assert torch.all(chosen <= smallest * (1 + rounding)), f"rows {(chosen > smallest).nonzero().flatten()[:5]}"


def near_ties(rows: int, features: int, gap: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 rows between two of many centroids: nearer to one of the two by the relative gap, on a random side."""
    centroids = randn(24, features, seed=seed).double()
    pairs = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i))[:2] for i in range(rows)])
    side = torch.where(randn(rows, seed=seed + 1) > 0, 1.0, -1.0)[:, None].double()
    a, b = centroids[pairs[:, 0]], centroids[pairs[:, 1]]
    return (a + b) / 2 + side * gap * (a - b), centroids


def clouds(rows: int, features: int, distance: float) -> Tensor:
    """Rows of two clouds of width 1 whose centres are far apart."""
    return randn(rows, features) + distance * (torch.arange(rows) % 2)[:, None]


def scaled(scale: float, rows: int = 500) -> tuple[Tensor, Tensor]:
    return randn(rows, 37) * scale, randn(50, 37, seed=1) * scale


FINE = 2.0**-20
ATTACKS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "plain": lambda: scaled(1.0),
    "one feature": lambda: (randn(500, 1), randn(50, 1, seed=1)),
    "one centroid": lambda: (randn(50, 9), randn(1, 9, seed=1)),
    "near ties in fp32": lambda: tuple(v.float() for v in near_ties(300, 64, 1e-7)),
    "near ties below fp32": lambda: near_ties(300, 64, 1e-12),
    "near ties, mixed dtypes": lambda: (near_ties(300, 64, 1e-9)[0], near_ties(300, 64, 1e-9)[1].float()),
    "near ties, long rows": lambda: tuple(v.float() for v in near_ties(40, 4096, 1e-7)),
    "common offset": lambda: (randn(500, 37) + 1e6, randn(50, 37, seed=1) + 1e6),
    "post-ReLU": lambda: (relu(200, 512), relu(64, 512, seed=1)),
    "post-ReLU, offset channel": lambda: tuple(relu(n, 64, seed=n) + 3e4 * torch.eye(64)[5] for n in (200, 64)),
    "two far clouds": lambda: (clouds(500, 37, 1e6), clouds(50, 37, 1e6)),
    "one far centroid": lambda: (randn(500, 37), torch.cat([randn(50, 37, seed=1), torch.full((1, 37), 1e8)])),
    "huge": lambda: scaled(1e37),
    "tiny": lambda: scaled(1e-36),
    "subnormal": lambda: scaled(1e-41),
    "tiny beside large": lambda: (randn(500, 37) * 1e-18, torch.cat([randn(20, 37), randn(20, 37, seed=1) * 1e-18])),
    "float64 huge": lambda: tuple(v.double() * 1e306 for v in scaled(1.0)),
    "centroids are rows": lambda: (randn(300, 20), randn(300, 20)[::7]),
    "one repeated row": lambda: (torch.ones(300, 5), torch.cat([torch.zeros(3, 5), torch.ones(4, 5)])),
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
    "cut off, float16": lambda: cut_off_attack(torch.float16),
    "cut off, float32": lambda: cut_off_attack(torch.float32),
}
FOR_KERNELS = [name for name in ATTACKS if "float64" not in name and name != "near ties, long rows"]


def attack(name: str, *, for_kernels: bool) -> tuple[Tensor, Tensor]:
    """Rows and centroids; fewer and in float32 at most for the kernels, which take no float64."""
    x, centroids = ATTACKS[name]()
    if not for_kernels:
        return x, centroids
    return tuple(v if v.dtype == torch.float16 else v.float() for v in (x[:36], centroids))


def cut_off_attack(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs of centroids at one distance but for a little; cutting off costs one more than the other.

    Of a pair, the first has large products of one sign first, the second has them last.
    """
    features = 512
    row = torch.ones(40, features) + 0.001 * randn(40, features)
    first = torch.full((20, features), 1.0 + 2.0**-9) + 0.01 * randn(20, features, seed=1)
    second = first.flip(1) + 2.0**-13 * randn(20, features, seed=2)
    return row.to(dtype), torch.cat([first, -first, second, -second])


def use_tiles(monkeypatch: pytest.MonkeyPatch, config: AssignConfig, shares: int | None = None) -> AssignConfig:
    """Have Triton's kernels run with these tiles and, where given, so many programs for the centroids of a row tile.

    Kernels that go through rows once take many at a time: the interpreter's time goes by programs.
    """
    from mapet_kernels.kmeans_assign import triton_backend

    monkeypatch.setattr(launch, "kmeans_assign_scores", lambda *_: config)
    monkeypatch.setattr(triton_backend, "_feature_blocks", lambda features, *_: (256 if features > 128 else 64, 64))
    if shares is not None:
        monkeypatch.setattr(launch, "kmeans_assign_shares", lambda *_: shares)
    return config


@dataclass
class Assign:
    """kmeans_assign in one way; results are on the CPU."""

    way: str
    monkeypatch: pytest.MonkeyPatch
    use: object = None
    config: AssignConfig = POINTERS

    @property
    def is_kernel(self) -> bool:
        """Whether 16-bit products with a bound decide, which take no float64."""
        return self.way not in ("reference", "gpu")

    @property
    def backend(self) -> str:
        """What is asked for."""
        return {"emulated": "cuda", "interpreted": "triton", "gpu": "auto", "gpu cuda": "cuda"}.get(self.way, self.way)

    def __call__(self, x: Tensor, centroids: Tensor, **options) -> Tensor | tuple[Tensor, ...]:
        device = "cuda" if self.way.startswith("gpu") else "cpu"
        found = kmeans_assign(x.to(device), centroids.to(device), backend=self.backend, **options)
        return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()

    def tiles(self, config: AssignConfig, shares: int | None = None) -> AssignConfig:
        """Of Triton's kernels in the interpreter; others have their own."""
        self.config = config
        if self.way == "interpreted":
            use_tiles(self.monkeypatch, config, shares)
        elif shares is not None:
            self.monkeypatch.setattr(launch, "kmeans_assign_shares", lambda *_: shares)
        return config

    def alternate(self, number: int) -> AssignConfig:
        """One of two kinds of tiles: rows read through pointers, or through descriptors."""
        return self.tiles((POINTERS, DESCRIPTORS)[number % 2])

    def randomise(self, choose: random.Random) -> None:
        """Any tiles, order of threads and number of processors, which the shares of the centroids follow."""
        tile = (choose.choice((16, 32)) for _ in range(3))
        self.tiles(AssignConfig(*tile, 4, 2, choose.random() < 0.5, choose.randint(1, 5)))
        count = choose.choice((1, 1, 3, 8))
        self.monkeypatch.setattr(passes, "processors", lambda _: count)
        if self.use is not None:
            self.use.host = emulation.AssignHost(choose.choice((70, 80)), choose.random() < 0.5)

    def redecided(self, x: Tensor, centroids: Tensor) -> tuple[int, int]:
        """Rows decided again among a few centroids, and among all; the ids are checked on the way."""
        ids, counts = self(x, centroids, return_redecided=True)
        assert_float64_argmin(ids, x, centroids)
        return tuple(counts.tolist())


ON_GPU = [pytest.param(way, marks=GPU) for way in ("gpu", "gpu cuda")]
WAYS = ["interpreted"] if INTERPRETED else ["reference", "emulated", *ON_GPU]
KERNELS = WAYS if INTERPRETED else WAYS[1:2]


def assign_in(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Assign]:
    """For fixtures: the way, with new memory NaN where kernels fill it."""
    if way == "gpu cuda" and (reason := reason_against_listed("cuda", "cuda")):
        pytest.skip(f"backend cuda does not run here: {reason}")
    emulated = emulation.emulated_assign() if way == "emulated" else nullcontext()
    with poisoned() if way in ("interpreted", "emulated") else nullcontext(), emulated as use:
        assign = Assign(way, monkeypatch, use)
        assign.tiles(POINTERS)
        yield assign


@pytest.fixture(params=WAYS)
def assign(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Assign]:
    yield from assign_in(request.param, monkeypatch)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Assign]:
    """The kernels alone."""
    yield from assign_in(request.param, monkeypatch)
