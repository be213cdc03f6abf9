"""Time every op of the registry, forward and forward + backward: pytest bench/bench_ops.py --benchmark-json out.json

Select an op with -k NAME. The device is a GPU where there is one. FLOP and bytes of the forward pass (visible pairs and
compulsory traffic only, from the registry) are in extra_info.
"""

from __future__ import annotations

import pytest
import torch

from mapet_kernels.backends import available_backends
from mapet_kernels.registry import REGISTRY, OpSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(spec, shape, backend, id=f"{spec.name}-{shape}-{backend}")
    for spec in REGISTRY.values()
    for shape in spec.shapes
    for backend in (*spec.backends, *(spec.gpu_backends if DEVICE == "cuda" else ()))
]


def _skip_if_refused(backend: str) -> None:
    if reason := available_backends(DEVICE, torch.float32).get(backend):
        pytest.skip(f"backend {backend} does not run here: {reason}")


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _describe(benchmark, spec: OpSpec, shape: str, dtype: torch.dtype) -> None:
    flop, moved = spec.cost(spec.shapes[shape], dtype)
    benchmark.extra_info |= {"device": DEVICE, "dtype": str(dtype), "flop": flop, "bytes": moved}


@pytest.mark.parametrize(("spec", "shape", "backend"), CASES)
def test_forward(benchmark, spec: OpSpec, shape: str, backend: str) -> None:
    _skip_if_refused(backend)
    case = spec.make_case(spec.shapes[shape], torch.float32, DEVICE)
    _describe(benchmark, spec, shape, torch.float32)

    def run() -> None:
        spec.function(**case.inputs, **case.options, backend=backend)
        _synchronize()

    benchmark(run)


@pytest.mark.parametrize(("spec", "shape", "backend"), [c for c in CASES if c.values[0].differentiable])
def test_forward_backward(benchmark, spec: OpSpec, shape: str, backend: str) -> None:
    _skip_if_refused(backend)
    case = spec.make_case(spec.shapes[shape], torch.float32, DEVICE)
    inputs = {name: x if name in case.fixed else x.requires_grad_() for name, x in case.inputs.items()}
    wanted = [x for x in inputs.values() if x.requires_grad]
    _describe(benchmark, spec, shape, torch.float32)

    def run() -> None:
        result = spec.function(**inputs, **case.options, backend=backend)
        parts = [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]
        torch.autograd.grad([part.sum() for part in parts], wanted)
        _synchronize()

    benchmark(run)
