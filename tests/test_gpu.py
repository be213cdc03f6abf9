"""What only a CUDA device can show; skipped by name elsewhere. `make test-gpu` runs these alone.

The error budget with bf16 (reliability, assertion 13), bitwise repeats (15), no recompilation (18), memory (20), and
that a training run is the same with every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from op_checks import assert_same_bits, check, run
from tasks import make_task, random_batch

from mapet.config import ModelConfig
from mapet.objectives.two_stream import TwoStreamTask
from mapet.rng import StepRng
from mapet.task import Batch, Draws
from mapet_kernels.backends import available_backends, choose_backend, reason_against_listed
from mapet_kernels.registry import REGISTRY, Case, OpSpec, TwoStreamShape
from mapet_kernels.selfcheck import two_stream_agreement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ATTENTION = REGISTRY["two_stream_attention"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = ModelConfig(image_size=64, patch_size=8, width=64, depth=3, heads=2, vocabulary=256)
ALL_CASES = [
    pytest.param(spec, shape, backend, id=f"{spec.name}-{shape}-{backend}")
    for spec in REGISTRY.values()
    for shape in spec.shapes
    for backend in (*spec.backends, *spec.gpu_backends)
]
DIFFERENTIABLE, WITHOUT_GRADIENT = (
    [case for case in ALL_CASES if case.values[0].differentiable == wanted] for wanted in (True, False)
)


def backends(spec: OpSpec) -> list[str]:
    """The op's backends that run on this device."""
    reasons = available_backends("cuda")
    return [name for name in (*spec.backends, *spec.gpu_backends) if reasons.get(name) is None]


RUNNING = backends(ATTENTION)
each_backend = pytest.mark.parametrize("backend", RUNNING)
each_other_backend = pytest.mark.parametrize("backend", [name for name in RUNNING if name != "reference"])


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
    check(spec, moved(spec.make_case(spec.shapes[shape], dtype), "cuda"), dtype, backend=backend)


@pytest.mark.parametrize(("spec", "shape", "backend"), WITHOUT_GRADIENT)
def test_ops_without_gradient(spec: OpSpec, shape: str, backend: str) -> None:
    if (reason := reason_against_listed(backend, "cuda", torch.float32)) is not None:
        pytest.skip(f"backend {backend} does not run here: {reason}")
    case = moved(spec.make_case(spec.shapes[shape], torch.float32), "cuda")
    check(spec, case, torch.float32, rounding=84, backend=backend)


@each_backend
def test_assertion_15_repeats_are_bitwise_equal(backend: str) -> None:
    # bf16, or fp16 on a GPU whose backend has no bf16.
    dtype = torch.bfloat16 if available_backends("cuda", torch.bfloat16)[backend] is None else torch.float16
    case = moved(ATTENTION.make_case(TwoStreamShape(197, 50, batch=64, heads=3, size=64), dtype), "cuda")
    first = None
    # torch's FlashAttention repeats its backward pass bit for bit only where it is asked to.
    with deterministic_algorithms(backend == "flash"):
        for _ in range(250):
            result = run(ATTENTION, case, dtype, backend=backend)
            first = first or result
            assert_same_bits(result, first)


def task_for(backend: str) -> TwoStreamTask:
    """A small MaPeT in fp32; skips the test of a backend that refuses fp32."""
    skip_if_refused(backend, torch.float32)
    return make_task("mapet", 20, TINY, backend=backend, skip_dropped=False).cuda()


def inputs(task: TwoStreamTask, images: int, step: int, batch: Batch | None = None) -> tuple[Batch, Draws]:
    """A batch of random images, and what a step draws for it, on the GPU."""
    device = torch.device("cuda")
    batch = batch or {name: value.cuda() for name, value in random_batch(TINY, images, seed=step).items()}
    return batch, task.ready(task.draw(images, StepRng(0, step, device)), device)


def losses(backend: str, steps: int, *, compile: bool = False) -> list[float]:
    """Losses of a small run on fixed random images."""
    task = task_for(backend)
    forward = torch.compile(task, fullgraph=True) if compile else task
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    batch, _ = inputs(task, 16, 0)
    curve = []
    for step in range(steps):
        loss = forward(*inputs(task, 16, step, batch), metrics=False)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve).tolist()


@each_other_backend
def test_fifty_steps_have_the_loss_curve_of_the_reference_backend(backend: str) -> None:
    assert losses(backend, 50) == pytest.approx(losses("reference", 50), rel=2e-3)


@each_backend
def test_assertion_18_compiled_model_does_not_recompile(backend: str) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = losses(backend, 5, compile=True)
    assert compiled == pytest.approx(losses(backend, 5), rel=2e-3)


@each_other_backend
def test_cuda_graph_replays_a_forward_and_backward_pass(backend: str) -> None:
    """Captured once on some images, replayed on others: the loss and gradients of an eager pass."""
    task = task_for(backend)
    parameters = list(task.parameters())

    def step(batch: Batch, draws: Draws) -> list[torch.Tensor]:
        loss = task(batch, draws, metrics=False)["loss"]
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    first, others = inputs(task, 8, 0), inputs(task, 8, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(*first)
    for static, other in zip(first, others, strict=True):
        for name, value in static.items():
            value.copy_(other[name])
    graph.replay()
    for actual, expected in zip(replayed, step(*others), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs sm_80")
def test_auto_is_triton_and_agrees_with_plain_torch() -> None:
    for dtype in DTYPES:
        assert choose_backend("auto", "cuda", dtype, (*ATTENTION.backends, *ATTENTION.gpu_backends), 64) == "triton"
        assert two_stream_agreement("auto", "cuda", dtype).holds
        assert two_stream_agreement("auto", "cuda", dtype, TwoStreamShape(2048, 700, size=64)).holds


def test_fp32_uses_tf32_only_where_torch_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" not in RUNNING:
        pytest.skip(f"backend triton does not run here: {available_backends('cuda')['triton']}")
    case = moved(ATTENTION.make_case(TwoStreamShape(197, 50, size=64), torch.float32), "cuda")
    exact = ATTENTION.plain(**{name: x.double() for name, x in case.inputs.items()}, **case.options)[1]
    errors = {}
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        out = ATTENTION.function(**case.inputs, **case.options, backend="triton")[1]
        errors[precision] = float((out - exact).abs().max())
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-2


@each_backend
def test_assertion_20_allocated_memory_does_not_grow(backend: str) -> None:
    losses(backend, 100)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    losses(backend, 1000)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
