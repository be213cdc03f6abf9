"""permuted_embed in CUDA C++ and in Triton, beyond what test_ops.py runs: any memory, any shape, indices out of range.

On CPU tensors: the CUDA C++ kernels' source thread by thread (emulation.py), and in a process with TRITON_INTERPRET=1
Triton's instead (test_triton_interpreter.py starts one).
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import nullcontext

import cuda_tools
import pytest
import torch
from emulation import BufferSizes, PatchSizes, Pixels, emulated_embed, library
from op_checks import GARBAGE, Fences, assert_same_bits, check, off_by_one, outputs_and_gradients, poisoned, run
from op_checks import with_inputs as leaves
from tasks import draws_for, make_task, random_batch

from mapet.config import ModelConfig
from mapet_kernels.backends import INTERPRETED
from mapet_kernels.permuted_embed import op, permuted_embed, reference
from mapet_kernels.registry import REGISTRY, PermutedEmbedShape

SPEC = REGISTRY["permuted_embed"]
DTYPES = [torch.float16, torch.float32, torch.float64]
BACKEND = "triton" if INTERPRETED else "cuda"
emulated = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")


@pytest.fixture
def use() -> Iterator:
    """The backend takes CPU tensors; new memory is NaN."""
    with poisoned(), nullcontext() if INTERPRETED else emulated_embed() as host:
        yield host


def embed(*images, **arguments) -> torch.Tensor:
    return permuted_embed(*images, **arguments, backend=BACKEND)


@emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, shape in SPEC.shapes.items() if shape.image_size < 100])
def test_the_same_bits_whatever_the_order_of_threads(use, name: str, dtype: torch.dtype) -> None:
    case = SPEC.make_case(SPEC.shapes[name], dtype)
    results = run(SPEC, case, dtype)
    assert use.host.calls == ["permuted_patches", "assemble", "position_gradient"]
    use.host.descending = True
    assert_same_bits(run(SPEC, case, dtype), results)


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(use, seed: int) -> None:
    """Patches of any size, widths that fill no whole 16 bytes, cuts at both ends."""
    choose = random.Random(seed)
    patch, grid, class_token = choose.choice((1, 2, 3, 4, 5, 8)), choose.randint(2, 4), choose.random() < 0.5
    tokens = grid**2 + int(class_token)
    shape = PermutedEmbedShape(
        patch * grid,
        patch,
        choose.choice((1, 6, 8, 17, 64, 80 if INTERPRETED else 260)),
        cut=choose.choice((1, tokens - 1, choose.randint(1, tokens - 1))),
        batch=choose.randint(1, 3),
        class_token=class_token,
        objective=choose.choice(("mapet", "pim", "mim")),
        uint8=choose.random() < 0.5,
    )
    dtype = choose.choice(DTYPES)
    check(SPEC, SPEC.make_case(shape, dtype, seed=seed), dtype, backend=BACKEND)


@pytest.mark.parametrize("uint8", [True, False])
def test_images_and_weights_anywhere_in_memory(use, uint8: bool) -> None:
    """Channels last, off by one element, transposed, cut out: the bits of the case that is aligned and contiguous."""
    case = SPEC.make_case(PermutedEmbedShape(16, 4, 24, cut=5, uint8=uint8), torch.float32)
    given = case.inputs | case.options
    images, expected = given.pop("images"), embed(**case.inputs, **case.options)
    wider = torch.nn.functional.pad(images, (0, 1))[..., :-1]
    turned = images.mT.contiguous().mT
    for moved in (images.to(memory_format=torch.channels_last), off_by_one(images), turned, wider):
        assert torch.equal(embed(moved, **given), expected)
    given |= {name: off_by_one(given[name]) for name in ("pos_embed", "mask_token", "class_token")}
    assert torch.equal(embed(images, **given), expected)


def test_permutations_with_strides(use) -> None:
    """Ranks are laid out for the kernel whatever the permutation's strides."""
    case = SPEC.make_case(SPEC.shapes["small"], torch.float32)
    turned = case.options | {"perm": case.options["perm"].t().contiguous().t()}
    actual, expected = (
        outputs_and_gradients(SPEC.function, leaves(case, torch.float32), options, backend=BACKEND)
        for options in (turned, case.options)
    )
    assert_same_bits([*actual[0], *actual[1].values()], [*expected[0], *expected[1].values()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_images_of_another_type_than_the_weights(use, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    case = SPEC.make_case(SPEC.shapes["float_images"], torch.float32)
    images = case.inputs.pop("images").to(dtype)
    for normalise in (True, False):
        options = case.options if normalise else case.options | {"mean": None, "std": None}
        actual = embed(images, **case.inputs, **options)
        assert torch.equal(actual, embed(images.float(), **case.inputs, **options))


@pytest.mark.parametrize("is_normalised", [True, False])
def test_bytes_become_what_torch_makes_of_them(use, is_normalised: bool) -> None:
    """All 256 values in the three channels, to a rounding."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(x) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    mean, std = (mean, std) if is_normalised else (None, None)
    arguments = images, torch.tensor([[3, 1, 0, 2]]), 8, mean, std
    exact = reference.permuted_patches(*arguments, torch.float64)
    for dtype, rounding in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        found = op.permuted_patches_op(*arguments, dtype, BACKEND)
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("class_token", [True, False])
def test_garbage_indices_stay_within_the_buffers(use, monkeypatch: pytest.MonkeyPatch, class_token: bool) -> None:
    """Wrong numbers, but no read of what lies around the buffers (NaN would show) and no write to it."""
    tokens, cut, width, fences = 9 + class_token, 4, 6, Fences()
    rows = tokens + 2 * (tokens - cut)
    perm = torch.cat([GARBAGE, torch.arange(class_token)])[None].contiguous()
    image, patches = fences.fenced(1, 3, 12, 12, value=1.0), fences.fenced(1, 9, 48, value=7.0)
    content, position, buffer = (fences.fenced(*x, value=1.0) for x in ((1, 9, width), (tokens, width), (rows, width)))
    d_position, d_masked = (fences.fenced(tokens, width, value=7.0) for _ in range(2))
    token = torch.ones(width)
    class_row = token if class_token else None
    if INTERPRETED:
        from mapet_kernels.permuted_embed import kernel, triton_backend

        monkeypatch.setattr(triton_backend, "empty_patches", lambda *_: patches)
        triton_backend.permuted_patches(image, perm[:, :9], 4, None, None, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *_, **__: buffer)
            triton_backend.assemble(content, position, token, class_row, perm, cut, True, True)
        kernel.assemble_position_gradient_kernel[(tokens, 1)](
            *(buffer, perm, d_position, d_masked, 1, tokens, tokens, cut, 2 * tokens - cut, width),
            MASK_TOKENS=True, QUERY_STREAM=True, BD=8, WORK=triton_backend._work(torch.float32), num_warps=1,
        )  # fmt: skip
        gradients = triton_backend.assemble_backward(torch.ones(rows, width), perm, cut, 9, class_token, True, True)
        assert all(gradient.isfinite().all() for gradient in gradients[:2])
    else:
        use.host.permuted_patches(image, perm[:, :9].contiguous(), patches, None, None, 4)
        use.host.assemble_streams(content, position, token, class_row, perm, buffer, cut, True, True)
        use.host.assemble_position_gradient(buffer, perm, d_position, d_masked, tokens, cut, True, True)
    assert (patches == 1).all() and (buffer == 2).all()
    assert (d_position % 2 == 0).all() and (d_masked % 2 == 0).all()
    fences.assert_whole()


def test_strides_beyond_32_bits(use) -> None:
    """Channels outermost: the third lies 2^31 bytes after the first. Memory that is not touched costs nothing."""
    side = 8
    torch.use_deterministic_algorithms(False)  # which would touch it all
    whole = torch.empty(3 * (2**30 // side**2 + 1) * side**2, dtype=torch.uint8)
    images = whole.view(3, -1, side, side).transpose(0, 1)[:2]
    images.copy_(torch.arange(2 * 3 * side**2).reshape(2, 3, side, side) % 251)
    patches = torch.tensor([[0, 1], [2, 3]])
    expected, actual = (
        op.permuted_patches_op(images, patches, 4, None, None, torch.float32, name) for name in ("reference", BACKEND)
    )
    torch.testing.assert_close(actual, expected)


@emulated
def test_sizes_beyond_the_kernels_are_refused() -> None:
    found, nothing = library("embed"), [None] * 5
    patches, patch = PatchSizes(1 << 20, 1 << 12, 64, 1), PatchSizes(1, 1, 1, 1 << 15)
    buffer, positions = BufferSizes(1 << 20, 1 << 12, 1 << 12, 5, 1), BufferSizes(1, 1 << 16, 1 << 16, 5, 1 << 16)
    for refusal in (
        found.host_permuted_patches(ctypes.byref(patches), 2, ctypes.byref(Pixels()), *nothing[:4], 0),
        found.host_permuted_patches(ctypes.byref(patch), 2, ctypes.byref(Pixels()), *nothing[:4], 0),
        found.host_assemble(ctypes.byref(buffer), 2, *nothing, None, 0),
        found.host_position_gradient(ctypes.byref(positions), 2, *nothing[:4], 0),
    ):
        assert refusal.startswith(b"more than 2^31 rows")


@emulated
def test_a_task_hands_backend_cuda_on(use) -> None:
    """MIM's attention is torch's own, so that its loss needs no other kernels."""
    model = ModelConfig(image_size=16, patch_size=4, width=16, depth=1, heads=1, vocabulary=64, drop_path=0.0)
    losses = []
    for backend in ("cuda", "reference"):
        task = make_task("mim", 6, model, backend=backend)
        loss = task(random_batch(model, 2), draws_for(task, 2), metrics=False)["loss"]
        loss.backward()
        losses.append(loss.item())
    assert use.host.calls == ["permuted_patches", "assemble", "position_gradient"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_shared_memory_is_within_every_limit() -> None:
    """The table of 3 * 256 values, in double: less than a kernel has without asking for more."""
    assert 3 * 256 * 8 <= 48 << 10 <= min(cuda_tools.SHARED_LIMITS.values())
