"""Are the kernels right on this device? Against float64, at the target's size, with outputs that were NaN before."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench import kmeans
from bench.attention_pass import VARIANTS, Pass, random_on
from bench.harvesting.common import attention_shape, device_of, dtypes_of
from bench.harvesting.part import Run
from mapet_kernels import kmeans_assign
from mapet_kernels.registry import REGISTRY
from mapet_kernels.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, budget
from mapet_kernels.two_stream_attention import reference, triton_backend

CHUNK = 32
"""Images whose scores exist in float64 at a time."""
ROWS = 1024
"""Of k-means, whose distances do."""


class Worst:
    """By result, the error and its budget where the error takes the largest share of it."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def add(self, part: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
        """Compare one result; what is not finite has an infinite error."""
        allowed = budget(plain, exact, FORWARD_FACTOR if part.startswith("out") else GRADIENT_FACTOR)
        finite = bool(torch.isfinite(actual).all())
        error = (actual.double() - exact).abs().max().item() if finite else float("inf")
        found = error, allowed
        self.found[part] = max(self.found.get(part, found), found, key=lambda x: x[0] / x[1])

    def record(self, run: Run, what: str, dtype: str) -> None:
        """A row "check" of each result. An error that is not finite is told as null."""
        for part, (error, allowed) in self.found.items():
            run.record("check", what=f"{what} {part}", dtype=dtype, error=error, allowed=allowed, ok=error <= allowed)


def attention(run: Run) -> None:
    """One variant in each dtype; every image is compared, a few at a time."""
    device, variant = device_of(run), run.arguments["variant"]
    shape = replace(attention_shape(run), **VARIANTS[variant])
    cut = perm = None
    if shape.image_order:  # and one cut per image, which leaves padding rows
        generator = torch.Generator(device).manual_seed(1)
        cut = torch.randint(shape.cuts, shape.tokens, (shape.batch,), generator=generator, device=device)
        perm = torch.rand(shape.batch, shape.tokens, generator=generator, device=device).argsort(dim=1)
    for name, dtype in dtypes_of(run, "bf16", "fp16").items():
        case, worst = Pass.make(shape, dtype, random_on(device), cut, perm), Worst()
        ours = case.part(slice(None), dtype).run(triton_backend)
        for first in range(0, shape.batch, CHUNK):
            images = slice(first, first + CHUNK)
            plain, exact = (case.part(images, work).run(reference) for work in (dtype, torch.float64))
            for part, actual in ours.items():
                worst.add(part, actual[images], plain[part], exact[part])
        worst.record(run, f"attention {variant}", name)


def embedding_and_kmeans(run: Run) -> None:
    """The permuted embedding, then the exact assignment."""
    for name, dtype in dtypes_of(run, "bf16", "fp16").items():
        embedding(run, name, dtype)
    assignment(run)


def embedding(run: Run, name: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the registry's costliest shape. What torch.empty gives holds NaN meanwhile."""
    spec = REGISTRY["permuted_embed"]
    shapes = sorted(spec.shapes.values(), key=lambda shape: spec.cost(shape, dtype)[0])
    case = spec.make_case(shapes[0 if run.dry else -1], dtype, str(device_of(run)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    actual = _results(spec.function, case, dtype, backend="triton")
    torch.use_deterministic_algorithms(False)
    plain, exact = _results(spec.plain, case, dtype), _results(spec.plain, case, torch.float64)
    worst = Worst()
    for part, x in actual.items():
        worst.add(part, x, plain[part], exact[part])
    worst.record(run, "embedding", name)


def _results(function, case, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Outputs, and gradients of their sum with weights that are the same in every dtype."""
    inputs = {
        name: x if name in case.fixed else x.to(dtype).detach().requires_grad_() for name, x in case.inputs.items()
    }
    result = function(**inputs, **case.options, **options)
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
    weights = [torch.arange(x.numel(), device=x.device).cos().view_as(x).to(x.dtype) for x in outputs]
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    found = {f"out_{number}": x.detach() for number, x in enumerate(outputs)}
    return found | {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}


def assignment(run: Run) -> None:
    """Exact ids against float64 on every row, half of the centroids near copies of the others."""
    features, clusters, rows = (16, 24, 40) if run.dry else (4096, 8192, 8192)
    dtype = next(iter(dtypes_of(run, "fp16")))
    made = kmeans.KMeansBenchmark((features,), (clusters,), rows, dtype, device=device_of(run).type)
    x, centroids = kmeans.clip_like(made, features, clusters)
    half = clusters // 2
    centroids[half : 2 * half] = centroids[:half] * (1 + 1e-6)
    ids = kmeans_assign(x, centroids, backend="triton")
    excess = 0.0
    for part, chosen in zip(x.double().split(ROWS), ids.split(ROWS), strict=True):
        scores = torch.addmm(centroids.double().square().sum(1), part, centroids.double().T, alpha=-2)
        distances = [(part - centroids[i].double()).square().sum(1) for i in (chosen, scores.argmin(1))]
        excess = max(excess, (distances[0] / distances[1].clamp(min=1e-300) - 1).max().item())
    allowed = 4 * features * 2.0**-53
    run.record("check", what="k-means exact ids", dtype=dtype, error=excess, allowed=allowed, ok=excess <= allowed)
