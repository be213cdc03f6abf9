"""The Triton kernels of permuted_embed in Triton's interpreter; test_triton_interpreter.py runs this file."""

from __future__ import annotations

import random

import pytest
import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from test_ops import outputs_and_gradients, tensors, with_inputs

from mapet_kernels.permuted_embed import kernel, triton_backend
from mapet_kernels.permuted_embed.op import permuted_patches_op
from mapet_kernels.registry import REGISTRY, Case, PermutedEmbedShape

SPEC = REGISTRY["permuted_embed"]
SMALL = [name for name, shape in SPEC.shapes.items() if shape.image_size < 100]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """torch.empty fills with NaN: an element that is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check_error_budget(case: Case, dtype: torch.dtype) -> None:
    """Outputs and gradients of the kernels against float64, in units of plain torch's error."""
    exact, exact_gradients = outputs_and_gradients(SPEC.plain, with_inputs(case, torch.float64), case.options)
    plain, plain_gradients = outputs_and_gradients(SPEC.plain, with_inputs(case, dtype), case.options)
    actual, gradients = outputs_and_gradients(SPEC.function, with_inputs(case, dtype), case.options, backend="triton")
    assert_within_budget(actual[0], plain[0], exact[0], factor=FORWARD_FACTOR, what="output")
    for name, a in gradients.items():
        assert_within_budget(
            a, plain_gradients[name], exact_gradients[name], factor=GRADIENT_FACTOR, what=f"gradient of {name}"
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_error_budget(name: str, dtype: torch.dtype) -> None:
    check_error_budget(SPEC.make_case(SPEC.shapes[name], dtype), dtype)


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    choose = random.Random(seed)
    patch, grid, class_token = choose.choice((1, 2, 3, 4, 8)), choose.randint(2, 4), choose.random() < 0.5
    tokens = grid**2 + int(class_token)
    shape = PermutedEmbedShape(
        patch * grid,
        patch,
        choose.choice((1, 8, 17, 64, 80)),
        cut=choose.randint(1, tokens - 1),
        batch=choose.randint(1, 3),
        class_token=class_token,
        objective=choose.choice(("mapet", "pim", "mim")),
        uint8=choose.random() < 0.5,
    )
    dtype = choose.choice((torch.float16, torch.float32, torch.float64))
    check_error_budget(SPEC.make_case(shape, dtype, seed=seed), dtype)


def test_gradcheck() -> None:
    case = SPEC.make_case(SPEC.shapes["small"], torch.float64)
    inputs = with_inputs(case, torch.float64)

    def function(*values: torch.Tensor):
        return tuple(tensors(SPEC.function(**dict(zip(inputs, values, strict=True)), **case.options, backend="triton")))

    assert torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)


def test_images_with_any_strides() -> None:
    """A batch in channels-last memory gives the bits of a contiguous one."""
    case = SPEC.make_case(SPEC.shapes["small"], torch.float32)
    expected = SPEC.function(**case.inputs, **case.options, backend="triton")
    turned = case.options["images"].to(memory_format=torch.channels_last)
    actual = SPEC.function(**case.inputs, **{**case.options, "images": turned}, backend="triton")
    assert torch.equal(actual, expected)


def test_permutations_with_strides() -> None:
    """Ranks are laid out for the kernel whatever the permutation's strides."""
    case = SPEC.make_case(SPEC.shapes["small"], torch.float32)
    _, expected = outputs_and_gradients(SPEC.function, with_inputs(case, torch.float32), case.options, backend="triton")
    options = case.options | {"perm": case.options["perm"].t().contiguous().t()}
    _, actual = outputs_and_gradients(SPEC.function, with_inputs(case, torch.float32), options, backend="triton")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def guarded(*shape: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of one value between two of NaN, and all three."""
    memory = torch.full((3, *shape), torch.nan)
    memory[1] = value
    return memory[1], memory


@pytest.mark.parametrize("class_token", [True, False])
def test_garbage_indices_stay_within_the_buffers(monkeypatch: pytest.MonkeyPatch, class_token: bool) -> None:
    """Wrong numbers, but no read of what lies around the buffers (NaN would show) and no write to it."""
    garbage = torch.tensor([-(2**62), -(2**31), -7, -1, 9, 20, 2**31, 2**40 + 3, 2**62])
    tokens, cut, width = 9 + class_token, 4, 6
    rows = tokens + 2 * (tokens - cut)
    perm = torch.cat([garbage, torch.arange(class_token)])[None]
    patches, around_patches = guarded(1, 9, 48, value=7.0)
    buffer, around_buffer = guarded(rows, width, value=7.0)
    monkeypatch.setattr(triton_backend, "empty_patches", lambda *_: patches)
    image, around_image = guarded(1, 3, 12, 12, value=1.0)
    triton_backend.permuted_patches(image, perm[:, :9], 4, None, None, torch.float32)
    assert (patches == 1).all()
    (content, around_content), (position, around_position) = (
        guarded(*shape, value=1.0) for shape in ((1, 9, width), (tokens, width))
    )
    token = torch.ones(width)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: buffer)
        triton_backend.assemble(content, position, token, token if class_token else None, perm, cut, True, True)
    assert (buffer == 2).all()
    (d_position, around_d_position), (d_masked, around_d_masked) = (guarded(tokens, width, value=7.0) for _ in "ab")
    sizes = 1, tokens, tokens, cut, 2 * tokens - cut, width
    kernel.assemble_position_gradient_kernel[(tokens, 1)](
        buffer, perm, d_position, d_masked, *sizes,
        MASK_TOKENS=True, QUERY_STREAM=True, BD=8, WORK=triton_backend._work(torch.float32), num_warps=1,
    )  # fmt: skip
    assert (d_position % 2 == 0).all() and (d_masked % 2 == 0).all()
    for memory in (
        around_patches, around_buffer, around_image, around_content, around_position, around_d_position, around_d_masked
    ):  # fmt: skip
        assert memory[[0, 2]].isnan().all() and not memory[1].isnan().any()
    d_rows = torch.ones(rows, width)
    gradients = triton_backend.assemble_backward(d_rows, perm, cut, 9, class_token, True, True)
    assert all(gradient.isfinite().all() for gradient in gradients[:2])


def test_strides_beyond_32_bits() -> None:
    """Channels outermost: the third lies 2^31 bytes after the first. Memory that is not touched costs nothing."""
    side = 8
    whole = torch.empty(3 * (2**30 // side**2 + 1) * side**2, dtype=torch.uint8)
    images = whole.view(3, -1, side, side).transpose(0, 1)[:2]
    images.copy_(torch.arange(2 * 3 * side**2).reshape(2, 3, side, side) % 251)
    patches = torch.tensor([[0, 1], [2, 3]])
    expected, actual = (
        permuted_patches_op(images, patches, 4, None, None, torch.float32, name) for name in ("reference", "triton")
    )
    torch.testing.assert_close(actual, expected)
