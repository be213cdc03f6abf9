"""What only a CUDA device can show; skipped by name elsewhere. `make test-gpu` runs these alone.

The error budget with bf16 (reliability, assertion 13), bitwise repeats (15), no recompilation (18), memory (20), and
that a training run is the same with every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from test_ops import outputs_and_gradients, tensors, with_inputs

from mapet.config import ModelConfig, ObjectiveConfig
from mapet.objectives import build_objective
from mapet_kernels.backends import available_backends, choose_backend, reason_against_listed
from mapet_kernels.registry import REGISTRY, Case, OpSpec, TwoStreamShape
from mapet_kernels.selfcheck import two_stream_agreement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = ModelConfig(image_size=64, patch_size=8, width=64, depth=3, heads=2, vocabulary=256)
ALL_CASES = [
    pytest.param(spec, shape, backend, id=f"{spec.name}-{shape}-{backend}")
    for spec in REGISTRY.values()
    for shape in spec.shapes
    for backend in (*spec.backends, *spec.gpu_backends)
]
DIFFERENTIABLE = [case for case in ALL_CASES if case.values[0].differentiable]
WITHOUT_GRADIENT = [case for case in ALL_CASES if not case.values[0].differentiable]


def backends(spec: OpSpec) -> list[str]:
    """The op's backends that run on this device."""
    reasons = available_backends("cuda")
    return [name for name in (*spec.backends, *spec.gpu_backends) if reasons.get(name) is None]


def skip_if_refused(backend: str, dtype: torch.dtype) -> None:
    """Skip by the reason that a backend gives against a dtype on this device."""
    if (reason := available_backends("cuda", dtype)[backend]) is not None:
        pytest.skip(f"backend {backend} does not run here: {reason}")


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Ask torch for deterministic kernels, without its filling of new memory."""
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling


def moved(case: Case, device: str) -> Case:
    """The case with all tensors on a device."""
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
    return Case({name: x.to(device) for name, x in case.inputs.items()}, options, case.fixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "shape", "backend"), DIFFERENTIABLE)
def test_assertion_13_error_budget(spec: OpSpec, shape: str, backend: str, dtype: torch.dtype) -> None:
    skip_if_refused(backend, dtype)
    case = moved(spec.make_case(spec.shapes[shape], dtype), "cuda")
    exact, exact_gradients = outputs_and_gradients(spec.plain, with_inputs(case, torch.float64), case.options)
    plain, plain_gradients = outputs_and_gradients(spec.plain, with_inputs(case, dtype), case.options)
    actual, gradients = outputs_and_gradients(spec.function, with_inputs(case, dtype), case.options, backend=backend)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_within_budget(a, p, e, factor=FORWARD_FACTOR, what=f"output {i}")
    for name, gradient in gradients.items():
        assert_within_budget(
            gradient, plain_gradients[name], exact_gradients[name], factor=GRADIENT_FACTOR, what=f"gradient of {name}"
        )


@pytest.mark.parametrize(("spec", "shape", "backend"), WITHOUT_GRADIENT)
def test_ops_without_gradient(spec: OpSpec, shape: str, backend: str) -> None:
    if (reason := reason_against_listed(backend, "cuda", torch.float32)) is not None:
        pytest.skip(f"backend {backend} does not run here: {reason}")
    case = moved(spec.make_case(spec.shapes[shape], torch.float32), "cuda")
    exact = tensors(spec.plain(**{name: x.double() for name, x in case.inputs.items()}, **case.options))
    actual = tensors(spec.function(**case.inputs, **case.options, backend=backend))
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.to(e.dtype), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends(REGISTRY["two_stream_attention"]))
def test_assertion_15_repeats_are_bitwise_equal(backend: str) -> None:
    spec = REGISTRY["two_stream_attention"]
    # bf16, or fp16 on a GPU whose backend has no bf16.
    dtype = torch.bfloat16 if available_backends("cuda", torch.bfloat16)[backend] is None else torch.float16
    case = moved(spec.make_case(TwoStreamShape(197, 50, batch=64, heads=3, size=64), dtype), "cuda")
    first = None
    # torch's FlashAttention repeats its backward pass bit for bit only where it is asked to.
    with deterministic_algorithms(backend == "flash"):
        for _ in range(250):
            out, gradients = outputs_and_gradients(
                spec.function, with_inputs(case, dtype), case.options, backend=backend
            )
            result = [*out, *gradients.values()]
            first = first or result
            assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


def losses(backend: str, steps: int, *, compile: bool = False) -> list[float]:
    """Losses of a small MaPeT run in fp32 on fixed random images; skips the test of a backend that refuses fp32."""
    skip_if_refused(backend, torch.float32)
    torch.manual_seed(0)
    objective = build_objective(ObjectiveConfig("mapet", 20), TINY, backend=backend).cuda()
    forward = torch.compile(objective, fullgraph=True) if compile else objective
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    generator = torch.Generator("cuda").manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 64, 64), generator=generator, device="cuda", dtype=torch.uint8)
    tokens = torch.randint(0, 256, (16, 64), generator=generator, device="cuda")
    curve = []
    for _ in range(steps):
        plan = objective.sample_plan(16, generator, "cuda")
        loss, _ = forward(images, tokens, plan.permutation, plan.keep, with_accuracy=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve).tolist()


@pytest.mark.parametrize("backend", [b for b in backends(REGISTRY["two_stream_attention"]) if b != "reference"])
def test_fifty_steps_have_the_loss_curve_of_the_reference_backend(backend: str) -> None:
    assert losses(backend, 50) == pytest.approx(losses("reference", 50), rel=2e-3)


@pytest.mark.parametrize("backend", backends(REGISTRY["two_stream_attention"]))
def test_assertion_18_compiled_model_does_not_recompile(backend: str) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = losses(backend, 5, compile=True)
    assert compiled == pytest.approx(losses(backend, 5), rel=2e-3)


@pytest.mark.parametrize("backend", [b for b in backends(REGISTRY["two_stream_attention"]) if b != "reference"])
def test_cuda_graph_replays_a_forward_and_backward_pass(backend: str) -> None:
    """Captured once on some images, replayed on others: the loss and gradients of an eager pass."""
    skip_if_refused(backend, torch.float32)
    torch.manual_seed(0)
    objective = build_objective(ObjectiveConfig("mapet", 20), TINY, backend=backend).cuda()
    parameters = list(objective.parameters())

    def draw(seed: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator("cuda").manual_seed(seed)
        images = torch.randint(0, 256, (8, 3, 64, 64), generator=generator, device="cuda", dtype=torch.uint8)
        tokens = torch.randint(0, 256, (8, 64), generator=generator, device="cuda")
        plan = objective.sample_plan(8, generator, "cuda")
        return images, tokens, plan.permutation, plan.keep

    def step(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        loss, _ = objective(*inputs, with_accuracy=False)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    inputs = draw(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(inputs)
    others = draw(1)
    for static, other in zip(inputs, others, strict=True):
        static.copy_(other)
    graph.replay()
    for actual, expected in zip(replayed, step(others), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs sm_80")
def test_auto_is_triton_and_agrees_with_plain_torch() -> None:
    spec = REGISTRY["two_stream_attention"]
    for dtype in DTYPES:
        assert choose_backend("auto", "cuda", dtype, (*spec.backends, *spec.gpu_backends), 64) == "triton"
        assert two_stream_agreement("auto", "cuda", dtype).holds
        assert two_stream_agreement("auto", "cuda", dtype, TwoStreamShape(2048, 700, size=64)).holds


def test_fp32_uses_tf32_only_where_torch_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" not in backends(REGISTRY["two_stream_attention"]):
        pytest.skip(f"backend triton does not run here: {available_backends('cuda')['triton']}")
    spec = REGISTRY["two_stream_attention"]
    case = moved(spec.make_case(TwoStreamShape(197, 50, size=64), torch.float32), "cuda")
    exact = spec.plain(**{name: x.double() for name, x in case.inputs.items()}, **case.options)[1]
    errors = {}
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        out = spec.function(**case.inputs, **case.options, backend="triton")[1]
        errors[precision] = float((out - exact).abs().max())
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-2


@pytest.mark.parametrize("backend", backends(REGISTRY["two_stream_attention"]))
def test_assertion_20_allocated_memory_does_not_grow(backend: str) -> None:
    losses(backend, 100)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    losses(backend, 1000)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
