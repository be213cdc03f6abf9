"""The CUDA C++ kernels of permuted_embed without a GPU: their own source run on the CPU, and compiled for GPUs.

test_cuda_source.py does the same for attention.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType

import cuda_tools
import pytest
import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from cuda_embed_host import BufferSizes, HostOperators, PatchSizes, Pixels, compile_library
from cuda_host import COMPILER
from test_ops import outputs_and_gradients, tensors, with_inputs

from mapet.config import ModelConfig, ObjectiveConfig
from mapet.objectives import build_objective
from mapet_kernels import backends
from mapet_kernels.permuted_embed import op, reference
from mapet_kernels.registry import REGISTRY, Case, PermutedEmbedShape

SPEC = REGISTRY["permuted_embed"]
SMALL = [name for name, shape in SPEC.shapes.items() if shape.image_size < 100]
MOST_REGISTERS, STATIC_LIMIT = 64, 48 << 10
HOST_DTYPES = [torch.float16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    host = HostOperators(compile_library(tmp_path_factory.mktemp("cuda_embed")))
    fragment = host.register()
    yield host
    fragment._destroy()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, operators: HostOperators):
    """The op takes backend cuda, whose operators are the emulated kernels; new memory is NaN."""
    if "mapet_kernels._C" not in sys.modules:
        monkeypatch.setitem(sys.modules, "mapet_kernels._C", ModuleType("mapet_kernels._C"))
    monkeypatch.setattr(op, "choose_listed_backend", lambda *_, **__: "cuda")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    operators.descending = False
    operators.calls.clear()
    torch.use_deterministic_algorithms(True)
    yield operators
    torch.use_deterministic_algorithms(False)


def check(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients, each within the error budget against float64."""
    exact, exact_gradients = outputs_and_gradients(SPEC.plain, with_inputs(case, torch.float64), case.options)
    plain, plain_gradients = outputs_and_gradients(SPEC.plain, with_inputs(case, dtype), case.options)
    actual, gradients = outputs_and_gradients(SPEC.function, with_inputs(case, dtype), case.options)
    assert_within_budget(actual[0], plain[0], exact[0], factor=FORWARD_FACTOR, what="output")
    for name, gradient in gradients.items():
        parts = gradient, plain_gradients[name], exact_gradients[name]
        assert_within_budget(*parts, factor=GRADIENT_FACTOR, what=f"gradient of {name}")
    return [*actual, *gradients.values()]


def skip_without_half(dtype: torch.dtype, host: HostOperators) -> None:
    sizes = PatchSizes(0, 1, 1, 1)  # no image: asks for the type only
    if dtype == torch.float16 and host.library.host_permuted_patches(
        ctypes.byref(sizes), 0, ctypes.byref(Pixels()), None, None, None, None, 0
    ):
        pytest.skip("the C++ compiler has no _Float16")


@pytest.mark.parametrize("dtype", HOST_DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_kernels_on_the_host_are_within_budget(host: HostOperators, name: str, dtype: torch.dtype) -> None:
    """And the same bits with threads and blocks in the other order."""
    skip_without_half(dtype, host)
    case = SPEC.make_case(SPEC.shapes[name], dtype)
    results = check(case, dtype)
    assert host.calls == ["permuted_patches", "assemble", "position_gradient"]
    host.descending = True
    out, gradients = outputs_and_gradients(SPEC.function, with_inputs(case, dtype), case.options)
    assert all(torch.equal(a, b) for a, b in zip(results, [*out, *gradients.values()], strict=True))


def test_the_size_of_vit_tiny(host: HostOperators) -> None:
    check(SPEC.make_case(SPEC.shapes["vit_tiny"], torch.float32), torch.float32)


@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(host: HostOperators, seed: int) -> None:
    """Patches of any size, widths that fill no whole 16 bytes, cuts at both ends."""
    choose = random.Random(seed)
    patch, grid, class_token = choose.choice((1, 2, 3, 4, 5, 8, 12)), choose.randint(2, 4), choose.random() < 0.5
    tokens = grid**2 + int(class_token)
    shape = PermutedEmbedShape(
        patch * grid,
        patch,
        choose.choice((1, 6, 8, 17, 64, 260)),
        cut=choose.choice((1, tokens - 1, choose.randint(1, tokens - 1))),
        batch=choose.randint(1, 3),
        class_token=class_token,
        objective=choose.choice(("mapet", "pim", "mim")),
        uint8=choose.random() < 0.5,
    )
    dtype = choose.choice(HOST_DTYPES)
    skip_without_half(dtype, host)
    check(SPEC.make_case(shape, dtype, seed=seed), dtype)


def test_gradcheck(host: HostOperators) -> None:
    case = SPEC.make_case(SPEC.shapes["small"], torch.float64)
    inputs = with_inputs(case, torch.float64)

    def function(*values: torch.Tensor):
        return tuple(tensors(SPEC.function(**dict(zip(inputs, values, strict=True)), **case.options)))

    assert torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)


def off_by_one(x: torch.Tensor) -> torch.Tensor:
    """The same numbers one element after the start of their memory, so that nothing is aligned."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("uint8", [True, False])
def test_images_and_weights_anywhere_in_memory(host: HostOperators, uint8: bool) -> None:
    """Channels last, off by one element, transposed, cut out: the bits of the case that is aligned and contiguous."""
    shape = PermutedEmbedShape(16, 4, 24, cut=5, uint8=uint8)
    case = SPEC.make_case(shape, torch.float32)
    images = case.options.pop("images", None) if uint8 else case.inputs.pop("images")
    expected = SPEC.function(images, **case.inputs, **case.options)
    wider = torch.nn.functional.pad(images, (0, 1))[..., :-1]
    for moved in (
        images.to(memory_format=torch.channels_last), off_by_one(images), images.mT.contiguous().mT, wider
    ):  # fmt: skip
        assert torch.equal(SPEC.function(moved, **case.inputs, **case.options), expected)
    names = ("pos_embed", "mask_token", "class_token")
    inputs = case.inputs | {name: off_by_one(case.inputs[name]) for name in names}
    assert torch.equal(SPEC.function(images, **inputs, **case.options), expected)


def test_permutations_with_strides(host: HostOperators) -> None:
    case = SPEC.make_case(SPEC.shapes["small"], torch.float32)
    expected, gradients = outputs_and_gradients(SPEC.function, with_inputs(case, torch.float32), case.options)
    options = case.options | {"perm": case.options["perm"].t().contiguous().t()}
    actual, others = outputs_and_gradients(SPEC.function, with_inputs(case, torch.float32), options)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(others[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_images_of_another_type_than_the_weights(host: HostOperators, dtype: torch.dtype) -> None:
    case = SPEC.make_case(SPEC.shapes["float_images"], torch.float32)
    images = case.inputs.pop("images").to(dtype)
    for normalise in (True, False):
        options = case.options if normalise else case.options | {"mean": None, "std": None}
        actual = SPEC.function(images, **case.inputs, **options)
        assert torch.equal(actual, SPEC.function(images.float(), **case.inputs, **options))


@pytest.mark.parametrize("is_normalised", [True, False])
def test_bytes_become_what_torch_makes_of_them(host: HostOperators, is_normalised: bool) -> None:
    """All 256 values in the three channels, to a rounding."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(x) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    mean, std = (mean, std) if is_normalised else (None, None)
    arguments = images, torch.tensor([[3, 1, 0, 2]]), 8, mean, std
    exact = reference.permuted_patches(*arguments, torch.float64)
    double = op.permuted_patches_op(*arguments, torch.float64, "cuda")
    torch.testing.assert_close(double, exact, rtol=1e-15, atol=1e-15)
    single = op.permuted_patches_op(*arguments, torch.float32, "cuda")
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=1e-6)


def guarded(*shape: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of one value between two of NaN, and all three."""
    memory = torch.full((3, *shape), torch.nan)
    memory[1] = value
    return memory[1], memory


@pytest.mark.parametrize("class_token", [True, False])
def test_garbage_indices_stay_within_the_buffers(operators: HostOperators, class_token: bool) -> None:
    """Wrong numbers, but no read of what lies around the buffers (NaN would show) and no write to it."""
    garbage = torch.tensor([-(2**62), -(2**31), -7, -1, 9, 20, 2**31, 2**40 + 3, 2**62])
    tokens, cut, width = 9 + class_token, 4, 6
    perm = torch.cat([garbage, torch.arange(class_token)])[None].contiguous()
    image, around_image = guarded(1, 3, 12, 12, value=1.0)
    patches, around_patches = guarded(1, 9, 48, value=7.0)
    operators.permuted_patches(image, perm[:, :9].contiguous(), patches, None, None, 4)
    assert (patches == 1).all()
    rows = tokens + 2 * (tokens - cut)
    shapes = (1, 9, width), (tokens, width), (rows, width)
    content, position, buffer = (guarded(*shape, value=1.0) for shape in shapes)
    token = torch.ones(width)
    arguments = content[0], position[0], token, token if class_token else None, perm, buffer[0]
    operators.assemble_streams(*arguments, cut, True, True)
    assert (buffer[0] == 2).all()
    d_position, d_masked = (guarded(tokens, width, value=torch.inf) for _ in range(2))
    operators.assemble_position_gradient(buffer[0], perm, d_position[0], d_masked[0], tokens, cut, True, True)
    assert d_position[0].isfinite().all() and d_masked[0].isfinite().all()
    around = [memory for _, memory in (content, position, buffer, d_position, d_masked)]
    for memory in (around_image, around_patches, *around):
        assert memory[[0, 2]].isnan().all() and not memory[1].isnan().any()


def test_sizes_beyond_the_kernels_are_refused(operators: HostOperators) -> None:
    library, nothing = operators.library, [None] * 5
    patches, patch = PatchSizes(1 << 20, 1 << 12, 64, 1), PatchSizes(1, 1, 1, 1 << 15)
    buffer, positions = BufferSizes(1 << 20, 1 << 12, 1 << 12, 5, 1), BufferSizes(1, 1 << 16, 1 << 16, 5, 1 << 16)
    for refusal in (
        library.host_permuted_patches(ctypes.byref(patches), 2, ctypes.byref(Pixels()), *nothing[:4], 0),
        library.host_permuted_patches(ctypes.byref(patch), 2, ctypes.byref(Pixels()), *nothing[:4], 0),
        library.host_assemble(ctypes.byref(buffer), 2, *nothing, None, 0),
        library.host_position_gradient(ctypes.byref(positions), 2, *nothing[:4], 0),
    ):
        assert refusal.startswith(b"more than 2^31 rows")


def test_the_objective_hands_backend_cuda_on(host: HostOperators) -> None:
    """MIM's attention is torch's own, so that its loss needs no other kernels."""
    model = ModelConfig(image_size=16, patch_size=4, width=16, depth=1, heads=1, vocabulary=64, drop_path=0.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, 64, (2, 16), generator=generator)
    losses = []
    for backend in ("cuda", "reference"):
        torch.manual_seed(0)
        objective = build_objective(ObjectiveConfig("mim", 6), model, backend=backend)
        plan = objective.sample_plan(2, torch.Generator().manual_seed(1), "cpu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "choose_listed_backend", lambda requested, *_, **__: requested)
            loss, _ = objective(images, tokens, plan.permutation, with_accuracy=False)
        loss.backward()
        losses.append(loss.item())
    assert host.calls == ["permuted_patches", "assemble", "position_gradient"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def pretend_v100(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the choice of a backend sees a machine with a V100, and the kernels built for it."""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(backends, "_reason_against_cuda_library", lambda index: None)


def test_auto_embeds_with_the_cuda_kernels_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a V100 in every dtype, as there is no product of matrices in them; k-means, which has one, not in float64."""

    def auto(dtype: torch.dtype, listed: tuple[str, ...] = op.BACKENDS, products: bool = False) -> str:
        return backends.choose_listed_backend("auto", listed, "cuda", dtype, products)

    monkeypatch.setattr(backends, "reason_against_triton", lambda *_: "needs compute capability 8.0")
    assert auto(torch.float32) == "reference", "the kernels are not built"
    pretend_v100(monkeypatch)
    assert {auto(dtype) for dtype in (*HOST_DTYPES, torch.bfloat16)} == {"cuda"}
    assert auto(torch.float64, products=True) == auto(torch.float32, ("reference", "triton")) == "reference"
    monkeypatch.setattr(backends, "reason_against_triton", lambda *_: None)
    assert auto(torch.float32) == "triton"
    with pytest.raises(ValueError, match="'cuda' cannot run here: needs a CUDA device, not cpu"):
        backends.choose_listed_backend("cuda", op.BACKENDS, "cpu", torch.float32, products=False)


def kernel_names(elements: tuple[str, ...]) -> list[str]:
    """C++ names of all kernels for the element types: pixels in bytes and in what is computed in, packs and not."""
    names = []
    for element in elements:
        work, pack = ("double", 2) if element == "double" else ("float", 4 if element == "float" else 8)
        names += [
            f"mapet::permuted_patches_kernel<{pixel}, {element}, {pixels}>"
            for pixel in ("unsigned char", work)
            for pixels in (1, 4)
        ]
        names += [f"mapet::assemble_kernel<{element}, {pixels}>" for pixels in (1, pack)]
        names.append(f"mapet::assemble_position_gradient_kernel<{element}>")
    return names


def check_resources(resources: list[cuda_tools.Resources], kernels: int) -> None:
    assert len(resources) == kernels
    for one in resources:
        assert one.spilled == 0 and one.registers <= MOST_REGISTERS, one


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", [75, 90])
def test_nvcc_compiles_without_spills(architecture: int, tmp_path: Path) -> None:
    """All kernels that the library holds, and whole packs move in one instruction."""
    cubin = tmp_path / "permuted_embed.cubin"
    check_resources(cuda_tools.nvcc_cubin(cuda_tools.CSRC / "permuted_embed.cu", architecture, cubin), 28)
    if cuda_tools.cuobjdump() is None:
        pytest.skip("compiled without spills; cuobjdump is not there to look at the instructions")
    found = cuda_tools.instructions(cubin, r"\b(LDG\.E\.128|STG\.E\.128|HMMA)\b")
    assemble = {name: counts for name, counts in found.items() if "15assemble_kernel" in name}
    packed = [name for name, counts in assemble.items() if counts["LDG.E.128"] and counts["STG.E.128"]]
    assert len(assemble) == 8 and len(packed) == 4 and not any("Li1E" in name for name in packed)
    assert all(counts["STG.E.128"] for name, counts in found.items() if "permuted_patches_kernelIhfLi4" in name)
    assert not any(counts["HMMA"] for counts in found.values()), "no kernel multiplies matrices"


def test_nvrtc_12_compiles_for_volta_without_spills() -> None:
    """V100, sm_70: CUDA 13 cannot compile for it any more. bfloat16 too, which needs no hardware for it here."""
    compiler = cuda_tools.Nvrtc12.find()
    if isinstance(compiler, str):
        pytest.skip(f"needs the CUDA 12 compiler: {compiler}")
    names = kernel_names(("__half", "__nv_bfloat16", "float", "double"))
    log, _ = compiler.compile(names, "sm_70", header="permuted_embed.cuh")
    check_resources(cuda_tools.parse_resources(log), len(names))
    assert all("sm_70" in entry for entry in log.split("Compiling entry function")[1:])


def test_shared_memory_is_within_every_limit() -> None:
    """The table of 3 * 256 values, in double: less than a kernel has without asking for more."""
    assert 3 * 256 * 8 <= STATIC_LIMIT <= min(cuda_tools.SHARED_LIMITS.values())
