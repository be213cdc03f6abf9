"""Are the kernels right on this device? Against float64, at the target's size, with outputs that were NaN before."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bench import kmeans
from bench.harvesting.common import attention_shape, device_of, dtypes_of
from bench.harvesting.part import Run
from mapet_kernels import kmeans_assign
from mapet_kernels.registry import REGISTRY, OpSpec
from mapet_kernels.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, budget
from mapet_kernels.two_stream_attention import image_order, reference, triton_backend
from mapet_kernels.two_stream_attention.problem import Problem, Streams

CHUNK = 32
"""Images whose scores exist in float64 at a time."""


class Attention:
    """Inputs and results of one variant: "plain"; "last_block" (query stream only); "pim" (no mask tokens); "gather"
    (image order, and one cut per image, which leaves padding rows)."""

    def __init__(self, run: Run, variant: str, dtype: torch.dtype) -> None:
        shape, device = attention_shape(run), device_of(run)
        generator = torch.Generator(device).manual_seed(0)
        cut: int | Tensor = shape.cuts
        self.perm = None
        if variant == "gather":
            cut = torch.randint(shape.cuts, shape.tokens, (shape.batch,), generator=generator, device=device)
            self.perm = torch.rand(shape.batch, shape.tokens, generator=generator, device=device).argsort(dim=1)
        problem = Problem(shape.tokens, shape.targets, cut, variant != "pim", shape.size**-0.5)

        def rows(count: int) -> Tensor:
            size = (shape.batch, count, shape.heads, shape.size)
            return torch.randn(size, generator=generator, device=device).to(dtype)

        def streams() -> Streams:
            content = None if variant == "last_block" else rows(problem.content_rows)
            return Streams(content, rows(shape.targets))

        self.problem, self.q, self.d_out = problem, streams(), streams()
        self.k, self.v = (torch.stack([rows(problem.content_rows) for _ in range(2)], dim=2)).unbind(2)

    def results(self, images: slice, dtype: torch.dtype, backend: ModuleType) -> dict[str, Tensor]:
        """Outputs and gradients of some images, from buffers that hold NaN before each pass."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[images].to(dtype)

        q, d_out = (Streams(cast(x.content), cast(x.query)) for x in (self.q, self.d_out))
        k, v = torch.stack([cast(self.k), cast(self.v)], dim=2).unbind(2)
        problem = self.problem
        if isinstance(problem.cut, Tensor):
            problem = Problem(problem.tokens, problem.targets, problem.cut[images], problem.mask_tokens, problem.scale)
        out, dq = poisoned(q), poisoned(q)
        lse_dtype = torch.promote_types(dtype, torch.float32)
        lse = Streams(*(x if x is None else nan(x.shape[:3], x, lse_dtype) for x in (out.content, out.query)))
        dk, dv = nan((*k.shape[:2], 2, *k.shape[2:]), k).unbind(2)
        backward = (d_out, q, k, v, out, lse, dq, dk, dv, problem)
        if self.perm is None:
            backend.forward(q, k, v, out, lse, problem)
            backend.backward(*backward)
        elif backend is triton_backend:
            backend.forward(q, k, v, out, lse, problem, self.perm[images])
            backend.backward(*backward, self.perm[images])
        else:
            image_order.forward(backend, self.perm[images], q, k, v, out, lse, problem)
            image_order.backward(backend, self.perm[images], *backward)
        found = {"out_content": out.content, "out_query": out.query, "dq_content": dq.content, "dq_query": dq.query}
        return {name: x for name, x in found.items() if x is not None} | {"dk": dk, "dv": dv}


def nan(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A buffer in which nothing unwritten goes unnoticed."""
    return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)


def poisoned(streams: Streams) -> Streams:
    """NaN in the shapes of streams."""
    return Streams(*(x if x is None else nan(x.shape, x) for x in (streams.content, streams.query)))


def attention(run: Run) -> None:
    """One variant in each dtype; every image is compared, a few at a time."""
    variant = run.arguments["variant"]
    for name, dtype in dtypes_of(run, "bf16", "fp16").items():
        case = Attention(run, variant, dtype)
        batch = case.k.shape[0]
        ours = case.results(slice(0, batch), dtype, triton_backend)
        worst = Worst()
        for first in range(0, batch, CHUNK):
            images = slice(first, min(first + CHUNK, batch))
            plain = case.results(images, dtype, reference)
            exact = case.results(images, torch.float64, reference)
            for part, actual in ours.items():
                worst.add(part, actual[images], plain[part], exact[part])
        worst.record(run, f"attention {variant}", name)


class Worst:
    """By result, the error and its budget where the error takes the largest share of it."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def add(self, part: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
        """Compare one result; what is not finite has an infinite error."""
        factor = FORWARD_FACTOR if part.startswith("out") else GRADIENT_FACTOR
        allowed = budget(plain, exact, factor)
        finite = bool(torch.isfinite(actual).all())
        error = (actual.double() - exact).abs().max().item() if finite else float("inf")
        before = self.found.get(part)
        if before is None or error / allowed > before[0] / before[1]:
            self.found[part] = error, allowed

    def record(self, run: Run, what: str, dtype: str) -> None:
        """A row "check" of each result. An error that is not finite is told as null."""
        for part, (error, allowed) in self.found.items():
            run.record("check", what=f"{what} {part}", dtype=dtype, error=error, allowed=allowed, ok=error <= allowed)


def embedding_and_kmeans(run: Run) -> None:
    """The permuted embedding, then the exact assignment."""
    spec = REGISTRY["permuted_embed"]
    for name, dtype in dtypes_of(run, "bf16", "fp16").items():
        embedding(run, spec, name, dtype)
    assignment(run)


def embedding(run: Run, spec: OpSpec, name: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the registry's costliest shape. What torch.empty gives holds NaN meanwhile."""
    device = device_of(run)
    shapes = sorted(spec.shapes.values(), key=lambda shape: spec.cost(shape, dtype)[0])
    case = spec.make_case(shapes[0 if run.dry else -1], dtype, str(device))
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
    ((name, dtype),) = dtypes_of(run, "fp16").items()
    x, centroids = kmeans.clip_like(rows, features, clusters, dtype, device_of(run))
    half = clusters // 2
    centroids[half : 2 * half] = centroids[:half] * (1 + 1e-6)
    ids = kmeans_assign(x, centroids, backend="triton")
    excess = 0.0
    for part, chosen in zip(x.double().split(1024), ids.split(1024), strict=True):
        scores = torch.addmm(centroids.double().square().sum(1), part, centroids.double().T, alpha=-2)
        distances = [(part - centroids[i].double()).square().sum(1) for i in (chosen, scores.argmin(1))]
        excess = max(excess, (distances[0] / distances[1].clamp(min=1e-300) - 1).max().item())
    allowed = 4 * features * 2.0**-53
    run.record("check", what="k-means exact ids", dtype=name, error=excess, allowed=allowed, ok=excess <= allowed)
