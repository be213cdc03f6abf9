"""Backend "flash" of two-stream attention beyond test_ops.py: its calls to a stand-in, its providers over fakes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import flash_standin
import pytest
import torch
from flash_standin import STANDIN, recording
from op_checks import outputs_and_gradients, with_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mapet.commands import doctor
from mapet_kernels import backends, flash_providers, two_stream_attention
from mapet_kernels.flash_providers import (
    CAUSAL,
    DENSE,
    Machine,
    Provider,
    Window,
    choose_provider,
    flash_attn_provider,
    torch_provider,
    xformers_bias,
    xformers_provider,
)
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.selfcheck import Agreement
from mapet_kernels.two_stream_attention import flash
from mapet_kernels.two_stream_attention.op import two_stream_attention_op
from mapet_kernels.two_stream_attention.problem import Problem
from mapet_kernels.visibility import two_stream_visibility

SPEC = REGISTRY["two_stream_attention"]
H100 = Machine("cuda", capability=(9, 0))


@pytest.fixture
def use() -> Iterator[Callable[[Provider], None]]:
    """use(provider) makes it the one that backend "flash" finds, on CPU tensors."""
    with ExitStack() as stack:
        yield lambda provider: stack.enter_context(flash_standin.used(provider))


@pytest.fixture
def standin(use) -> None:
    use(STANDIN)


def operands(case):
    """Arguments of the op for a case, before scale and backend."""
    options, inputs = case.options, case.inputs
    one_cut, cuts = (-1, options["cut"]) if isinstance(options["cut"], Tensor) else (options["cut"], None)
    q_content = inputs.get("q_content")
    names = (q_content, inputs["q_query"], inputs["k"], inputs["v"], one_cut, cuts)
    return *names, options.get("perm"), options["mask_tokens"]


def assert_equals_reference(shape: TwoStreamShape, seed: int = 0) -> None:
    """Outputs, log-sum-exps and all gradients of backend flash are those of backend reference, in float64."""
    case = SPEC.make_case(shape, torch.float64, seed=seed)
    for actual, expected in zip(
        *(two_stream_attention_op(*operands(case), 0.3, name) for name in ("flash", "reference")), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    actual, expected = (
        outputs_and_gradients(SPEC.function, with_inputs(case, torch.float64), case.options, backend=name)
        for name in ("flash", "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def random_shape(draw: random.Random) -> TwoStreamShape:
    """Any small shape: one cut or one per image, with and without permutation, mask tokens and content stream."""
    tokens, batch = draw.randint(1, 20), draw.randint(1, 4)
    per_image = tuple(draw.randint(0, tokens - 1) for _ in range(batch))
    return TwoStreamShape(
        tokens,
        draw.choice([per_image, draw.randint(0, tokens - 1)]),
        batch=batch,
        heads=draw.randint(1, 3),
        size=draw.choice([1, 5, 8, 16]),
        mask_tokens=draw.random() < 0.7,
        image_order=draw.random() < 0.5,
        with_content=draw.random() < 0.8,
    )


@pytest.mark.parametrize("seed", range(4))
def test_two_hundred_random_shapes(standin, seed: int) -> None:
    draw = random.Random(seed)
    for number in range(50):
        assert_equals_reference(random_shape(draw), seed=number)


@pytest.mark.parametrize("image_order", [False, True])
def test_nan_in_padding_rows_leaves_no_trace(standin, image_order: bool) -> None:
    """With one cut per image; and padding gets output 0, log-sum-exp -inf and gradient 0 whatever comes back to it."""
    case = SPEC.make_case(TwoStreamShape(13, (4, 9), image_order=image_order), torch.float64)
    clean = outputs_and_gradients(SPEC.function, with_inputs(case, torch.float64), case.options, backend="flash")
    case.inputs["q_query"][1, 4:] = float("nan")
    for name in ("q_content", "k", "v"):
        case.inputs[name][1, 17:] = float("nan")
    for lse in two_stream_attention_op(*operands(case), 0.3, "flash")[2:]:
        blind = torch.zeros(lse.shape[:2], dtype=torch.bool)
        blind[1, -5:] = True  # the second image's padding rows
        assert torch.equal(lse.isneginf(), blind.unsqueeze(2).expand_as(lse)) and lse[~blind].isfinite().all()
    leaves = with_inputs(case, torch.float64)
    content, query = two_stream_attention(**leaves, **case.options, backend="flash")
    assert torch.equal(content, clean[0][0]) and torch.equal(query, clean[0][1])
    weights = [torch.cos(torch.arange(x.numel())).view_as(x).to(x) for x in (content, query)]
    weights[0][1, 17:], weights[1][1, 4:] = float("nan"), float("nan")
    gradients = torch.autograd.grad((content, query), list(leaves.values()), weights)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, clean[1][name])


def test_a_row_that_sees_nothing_never_reaches_a_provider(standin) -> None:
    """The stand-in refuses such rows. Output 0, log-sum-exp -inf, gradients 0, also for a batch of one-token images."""
    for tokens in (1, 7):
        case = SPEC.make_case(TwoStreamShape(tokens, 0, mask_tokens=False), torch.float64)
        *_, lse_content, lse_query = two_stream_attention_op(*operands(case), 0.3, "flash")
        assert lse_query[:, 0].isneginf().all() and lse_query[:, 1:].isfinite().all() and lse_content.isfinite().all()
        leaves = with_inputs(case, torch.float64)
        _, query = two_stream_attention(**leaves, **case.options, backend="flash")
        assert query[:, 0].abs().max() == 0
        d_query = torch.autograd.grad(query.sum(), leaves["q_query"])[0]
        assert d_query[:, 0].abs().max() == 0


@pytest.mark.parametrize("mask_tokens", [True, False])
def test_memory_that_the_kernels_cannot_read_is_copied(standin, mask_tokens: bool) -> None:
    """Rows of 18 bytes, a start off by 2 bytes, a last dimension with gaps: the stand-in refuses them as they are."""
    case = SPEC.make_case(TwoStreamShape(9, 4, size=8, mask_tokens=mask_tokens), torch.float16)
    tight = two_stream_attention(**case.inputs, **case.options, backend="flash")

    def odd(x: Tensor, size: int, start: int, step: int) -> Tensor:
        wide = x.new_empty(*x.shape[:-1], size)
        return wide[..., start::step][..., : x.shape[-1]].copy_(x)

    for size, start, step in ((9, 0, 1), (16, 1, 1), (16, 0, 2)):
        case_inputs = {name: odd(x, size, start, step) for name, x in case.inputs.items()}
        assert all(x.stride(-1) == step for x in case_inputs.values())
        loose = two_stream_attention(**case_inputs, **case.options, backend="flash")
        assert torch.equal(loose[0], tight[0]) and torch.equal(loose[1], tight[1])


@pytest.mark.parametrize("backend", ["flash", "sdpa"])
def test_compiles_without_graph_break(request, backend: str) -> None:
    """Also where another backend is asked for by name."""
    if backend == "flash":
        request.getfixturevalue("standin")
    case = SPEC.make_case(TwoStreamShape(9, 4, size=16), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(two_stream_attention, fullgraph=True, backend="eager")
    eager = two_stream_attention(**case.inputs, **case.options, backend=backend)
    torch.testing.assert_close(compiled(**case.inputs, **case.options, backend=backend), eager)


def test_autocast_decides_the_dtype_that_is_asked_about(use, monkeypatch) -> None:
    """fp32 tensors in a bf16 region are bf16 to the backend, and bf16 tensors outside stay what they are."""
    use(STANDIN)
    asked = []
    monkeypatch.setattr(backends, "reason_against_flash", lambda device, dtype: asked.append(dtype))
    case = SPEC.make_case(TwoStreamShape(5, 2, size=8), torch.float32)
    two_stream_attention(**case.inputs, **case.options, backend="flash")
    with torch.autocast("cpu", torch.bfloat16):
        two_stream_attention(**case.inputs, **case.options, backend="flash")
    assert asked == [torch.float32, torch.bfloat16]


def test_calls_and_copies_are_those_the_module_promises(use) -> None:
    log = []
    use(recording(log))

    def windows(shape: TwoStreamShape) -> list[tuple]:
        log.clear()
        case = SPEC.make_case(shape, torch.float64)
        outputs_and_gradients(SPEC.function, with_inputs(case, torch.float64), case.options, backend="flash")
        kinds = {"forward": 0, "backward": 1}
        shapes = [(name, a[kinds[name]].shape[1], a[kinds[name] + 1].shape[1], a[-2]) for name, a in log]
        half = len(shapes) // 2
        assert [s[1:] for s in shapes[:half]] == [s[1:] for s in shapes[half:]], "backward calls mirror forward calls"
        return [s[1:] for s in shapes[:half]]

    window = Window(9, 0)
    four = [(4, 10, DENSE), (6, 10, DENSE), (6, 15, window), (6, 15, window)]
    assert windows(TwoStreamShape(10, 4)) == four
    assert windows(TwoStreamShape(10, 4, image_order=True)) == [(10, 10, DENSE), *four[2:]]
    assert windows(TwoStreamShape(10, (4, 9, 6), batch=3)) == [(10, 10, DENSE), *four[2:]], "all cuts in three calls"
    assert windows(TwoStreamShape(10, 4, with_content=False)) == four[-1:]
    assert windows(TwoStreamShape(10, 4, mask_tokens=False)) == [(4, 4, DENSE), (6, 10, CAUSAL), (6, 9, CAUSAL)]
    assert windows(TwoStreamShape(10, 0, mask_tokens=False)) == [(10, 10, CAUSAL), (9, 9, CAUSAL)]

    case = SPEC.make_case(TwoStreamShape(10, 4, size=16), torch.float64)
    log.clear()
    two_stream_attention(**case.inputs, **case.options, backend="flash")
    own = {case.inputs[name].untyped_storage().data_ptr() for name in ("q_content", "q_query")}
    assert {arguments[0].untyped_storage().data_ptr() for _, arguments in log} == own, "rows are read where they stand"
    assert len({arguments[1].untyped_storage().data_ptr() for _, arguments in log}) == 1, "one copy of the keys"


def test_gradients_of_one_key_are_added_in_fp32(use) -> None:
    """Calls that give 256, 1, 1 and 1 to a key: added in bf16 they stay 256, added in fp32 they round to 260."""

    def backward(d_out, q, k, v, out, lse, window, scale):
        value = 256.0 if window == DENSE and q.shape[1] == 2 else 1.0  # the 2 rows A, which come first
        return torch.zeros_like(q), torch.full_like(k, value), torch.full_like(v, value)

    use(Provider("constants", flash_standin.forward, backward))
    case = SPEC.make_case(TwoStreamShape(6, 2, size=8), torch.bfloat16)
    _, gradients = outputs_and_gradients(
        SPEC.function, with_inputs(case, torch.bfloat16), case.options, backend="flash"
    )
    # Content token 0 is key T of M, A, B, which all four calls are given.
    assert gradients["k"][0, 0, 0, 0] == 260.0 == gradients["v"][0, 0, 0, 0]


def test_windows_are_those_of_the_visibility_rule() -> None:
    """The calls of a problem, put together, see what visibility.two_stream_visibility says."""
    for tokens, cut, mask_tokens in itertools.product((1, 7), (0, 3, 6), (True, False)):
        if cut >= tokens:
            continue
        targets = tokens - cut
        content, query = two_stream_visibility(tokens, cut, mask_tokens=mask_tokens)
        if mask_tokens:  # keys A, B, M -> M, A, B
            content, query = (torch.cat([x[:, tokens:], x[:, :tokens]], dim=1) for x in (content, query))
        seen = torch.zeros_like(content), torch.zeros_like(query)
        problem = Problem(tokens, targets, cut, mask_tokens, 1.0)
        for call in flash.calls(problem, True, False):
            part = seen[0 if call.content else 1][call.rows]
            part[:, call.keys] = flash_standin.sees(part.shape[0], call.keys.stop - call.keys.start, call.window)
        assert torch.equal(seen[0], content) and torch.equal(seen[1], query)


ADAPTER_SHAPES = (TwoStreamShape(9, 4, size=8), TwoStreamShape(9, 3, mask_tokens=False, size=5))


@pytest.mark.parametrize("version", flash_standin.SIGNATURES)
def test_flash_attn_of_every_signature(use, version: str) -> None:
    """The composition over a fake of the package computes the reference's numbers, so every argument lands right."""
    log = []
    use(flash_attn_provider(flash_standin.flash_attn(version, log), version))
    for shape in ADAPTER_SHAPES:
        assert_equals_reference(shape)
    backward_calls = [arguments for arguments in log if "dout" in arguments]
    assert backward_calls and all(arguments["deterministic"] is True for arguments in backward_calls)
    for arguments in log:
        assert arguments.get("dropout_p", 0.0) == 0.0 and arguments.get("softcap", 0.0) == 0.0
        assert arguments.get("alibi_slopes") is None and not arguments.get("return_softmax")


def test_an_unknown_flash_attn_is_refused_with_its_arguments() -> None:
    known = flash_standin.flash_attn("2.6", [])

    class Old:
        _flash_attn_forward = staticmethod(known._flash_attn_forward)

        @staticmethod
        def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal):
            pass

    class New:
        _flash_attn_backward = staticmethod(known._flash_attn_backward)

        @staticmethod
        def _flash_attn_forward(q, k, v, softmax_scale, window_size, sink):
            pass

    with pytest.raises(ImportError, match=r"_flash_attn_backward lacks deterministic, window_size$"):
        flash_attn_provider(Old, "2.3")
    with pytest.raises(ImportError, match=r"an unknown version: _flash_attn_forward wants sink"):
        flash_attn_provider(New, "9.9")


def test_torch_operators_get_their_arguments_and_give_the_documented_shapes(monkeypatch) -> None:
    """Against the real schemas, by the operators' own meta kernels."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    provider = torch_provider()
    q = torch.empty(2, 5, 3, 16, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 9, 3, 16, dtype=torch.bfloat16, device="meta")
    for window in (DENSE, CAUSAL, Window(3, 0)):
        out, lse = provider.forward(q, k, k, window, 0.3)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        assert (lse.shape, lse.dtype) == ((2, 3, 5), torch.float32)
        gradients = provider.backward(out, q, k, k, out, lse, window, 0.3)
        assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


class TorchFlash(TorchDispatchMode):
    """torch's FlashAttention operators on CPU tensors: the stand-in computes, with arguments bound by the schema."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        a = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | (kwargs or {})
        if "_flash_attention" not in function._schema.name:
            return function(*args, **(kwargs or {}))
        rows = a["query"].shape[1], a["key"].shape[1]
        assert a["dropout_p"] == 0.0 and a["cum_seq_q"] is None and (a["max_q"], a["max_k"]) == rows
        window = Window(a["window_size_left"], 0 if a["is_causal"] else a["window_size_right"])
        tensors = a["query"], a["key"], a["value"]
        if "backward" in function._schema.name:
            results = a["out"], a["logsumexp"]
            return flash_standin.backward(a["grad_out"], *tensors, *results, window, a["scale"])
        assert a["return_debug_mask"] is False
        out, lse = flash_standin.forward(*tensors, window, a["scale"])
        return out, lse[..., : rows[0]].contiguous(), *(torch.empty(0),) * 3


def test_torch_operators_give_the_composition_what_it_needs(use, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    real = torch_provider()

    def through_the_mode(function):
        def call(*arguments):
            with TorchFlash():
                return function(*arguments)

        return call

    use(Provider("torch", through_the_mode(real.forward), through_the_mode(real.backward)))
    for shape in ADAPTER_SHAPES:
        assert_equals_reference(shape)


def test_xformers_adapter(use) -> None:
    provider = xformers_provider(flash_standin.xformers_fmha(), "0.0.35")
    assert (provider.name, provider.deterministic) == ("xformers 0.0.35", False)
    use(provider)
    for shape in ADAPTER_SHAPES:
        assert_equals_reference(shape)
    with pytest.raises(ValueError, match="end at the aligned key"):
        xformers_bias(flash_standin.xformers_fmha(), Window(2, 1))


def test_xformers_without_flash_attention_or_windows_is_refused() -> None:
    fmha = flash_standin.xformers_fmha()
    fmha.flash.BwOp.is_available = lambda: False
    with pytest.raises(ImportError, match=r"xformers 0\.0\.1 is built without FlashAttention"):
        xformers_provider(fmha, "0.0.1")
    fmha = flash_standin.xformers_fmha()
    fmha.flash.BwOp.SUPPORTED_ATTN_BIAS_TYPES = [type(None)]
    with pytest.raises(ImportError, match="takes no windows in fa2"):
        xformers_provider(fmha, "0.0.1")


def test_the_biases_of_xformers_are_our_windows() -> None:
    fmha = pytest.importorskip("xformers.ops.fmha", exc_type=ImportError)
    for rows, keys in ((1, 1), (3, 3), (3, 7), (7, 9)):
        for window in (CAUSAL, *(Window(left, 0) for left in range(keys))):
            mask = xformers_bias(fmha, window).materialize((rows, keys)) == 0
            assert torch.equal(mask, flash_standin.sees(rows, keys, window))


def named(name: str, **options) -> Provider:
    return Provider(name, flash_standin.forward, flash_standin.backward, **options)


def test_the_first_provider_that_works_is_chosen() -> None:
    everything = {
        "flash_attn_interface": named("FA3", only=(9,)),
        "flash_attn": named("FA2"),
        "torch": named("torch"),
        "xformers": named("xformers", deterministic=False),
    }
    assert list(everything) == list(flash_providers.LOADERS)

    def chosen(machine: Machine, **changes) -> str:
        load = {**everything, **changes}.__getitem__
        found = choose_provider(machine, torch.bfloat16, everything, load)
        return found if isinstance(found, str) else found.name

    a100 = Machine("cuda", capability=(8, 0))
    assert chosen(H100) == "FA3" and chosen(a100) == "FA2"
    assert chosen(H100, flash_attn_interface="not installed", flash_attn="not installed") == "torch"
    none = dict.fromkeys(("flash_attn_interface", "flash_attn", "torch"), "not installed")
    assert chosen(a100, **none) == "xformers"
    strict = Machine("cuda", capability=(8, 0), deterministic=True)
    assert chosen(strict) == "FA2"
    assert chosen(strict, **none) == (
        "no provider of FlashAttention: flash_attn_interface: not installed; flash_attn: not installed; "
        "torch: not installed; "
        "xformers: has no deterministic backward pass, and torch.use_deterministic_algorithms is on"
    )
    assert "flash_attn_interface: runs on compute capability 9.x only" in chosen(
        a100, flash_attn="not installed", torch="no", xformers="no"
    )


@pytest.mark.parametrize(
    ("machine", "dtype", "reason"),
    [
        (Machine("cpu"), torch.float16, "needs a CUDA device, not cpu"),
        (H100, torch.float32, "takes float16 and bfloat16, not float32"),
        (H100, torch.float64, "takes float16 and bfloat16, not float64"),
        (Machine("cuda", cuda_found=False), torch.float16, "torch finds no CUDA device"),
        (Machine("cuda", rocm=True, capability=(9, 4)), torch.float16, "needs CUDA, this torch is built for ROCm"),
        (
            Machine("cuda", capability=(7, 5)),
            torch.float16,
            "needs compute capability 8.0 or newer, this device has 7.5",
        ),
    ],
)
def test_reasons_against_a_machine(machine: Machine, dtype: torch.dtype, reason: str) -> None:
    assert choose_provider(machine, dtype, ["any"], lambda name: named(name)) == reason


def test_what_cannot_be_loaded_says_why(monkeypatch) -> None:
    flash_providers.load_provider.cache_clear()
    try:
        monkeypatch.setattr(flash_providers.importlib.util, "find_spec", lambda name: None)
        assert flash_providers.load_provider("flash_attn") == "not installed"
        flash_providers.load_provider.cache_clear()
        monkeypatch.setattr(flash_providers.importlib.util, "find_spec", lambda name: "found")

        def broken(name: str):
            raise ImportError("libcudart.so.11: cannot open shared object file\nand more")

        monkeypatch.setattr(flash_providers.importlib, "import_module", broken)
        reason = "cannot be used: libcudart.so.11: cannot open shared object file"
        assert flash_providers.load_provider("flash_attn") == flash_providers.load_provider("xformers") == reason
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        assert flash_providers.load_provider("torch") == "cannot be used: this torch is built without FlashAttention"
    finally:
        flash_providers.load_provider.cache_clear()


def test_asking_for_flash_on_a_cpu_says_why() -> None:
    case = SPEC.make_case(TwoStreamShape(5, 2), torch.float16)
    with pytest.raises(ValueError, match="backend 'flash' cannot run here: needs a CUDA device, not cpu"):
        two_stream_attention(**case.inputs, **case.options, backend="flash")
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        flash_providers.provider_for("cpu", torch.float16)
    assert backends.available_backends("cpu")["flash"] == "needs a CUDA device, not cpu"
    assert backends.choose_backend("auto", "cuda", torch.bfloat16, backends.TWO_STREAM_BACKENDS) != "flash"


def test_wide_heads_are_refused(standin) -> None:
    case = SPEC.make_case(TwoStreamShape(3, 1, size=257), torch.float64)
    with pytest.raises(ValueError, match="head sizes 1 to 256, got 257"):
        two_stream_attention(**case.inputs, **case.options, backend="flash")


def test_doctor_names_the_provider(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "provider_for", lambda device: named("flash_attn 2.8.3"))
    monkeypatch.setattr(doctor, "two_stream_agreement", lambda *_: Agreement(outputs=0.5, gradients=0.25))
    runs, sdpa = doctor.backend_findings("cuda:0", {"flash": None, "sdpa": None})
    assert runs.status == sdpa.status == "ok"
    assert "by flash_attn 2.8.3: errors are 0.50" in runs.detail and " by " not in sdpa.detail
    (refused,) = doctor.backend_findings("cpu", {"flash": "needs a CUDA device, not cpu"})
    assert (refused.status, refused.detail) == ("absent", "needs a CUDA device, not cpu")
