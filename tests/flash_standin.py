"""Stand-ins for FlashAttention on CPU tensors: its documented rules in plain torch, and its packages as they were."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mapet_kernels import backends, flash_providers
from mapet_kernels.flash_providers import HEAD_SIZE_MULTIPLE, Provider, Window

LSE_PADDING = 32


def sees(rows: int, keys: int, window: tuple[int, int]) -> Tensor:
    """Bottom-right aligned window, bool (R, K), as flash-attn documents it."""
    left, right = window
    row, key = torch.arange(rows).unsqueeze(1) + keys - rows, torch.arange(keys)
    visible = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        visible &= key >= row - left
    if right >= 0:
        visible &= key <= row + right
    return visible


def forward(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """out (B, R, H, D) and log-sum-exp (B, H, R rounded up to 32), NaN beyond R. Refuses what the libraries refuse."""
    visible = sees(q.shape[1], k.shape[1], window)
    check_tensors(q, k, v)
    assert visible.any(1).all(), "a row that sees nothing"
    dtype, (q, k, v) = q.dtype, in_working_dtype(q, k, v)
    scores = (torch.einsum("brhd,bkhd->bhrk", q, k) * scale).masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhrk,bkhd->brhd", scores.softmax(-1), v)
    return out.to(dtype), F.pad(lse, (0, -lse.shape[-1] % LSE_PADDING), value=float("nan"))


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the output and log-sum-exp that are given: no softmax is computed again."""
    check_tensors(d_out, q, k, v, out)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.is_contiguous()
    visible = sees(q.shape[1], k.shape[1], window)
    dtype, (d_out, q, k, v, out) = q.dtype, in_working_dtype(d_out, q, k, v, out)
    scores = (torch.einsum("brhd,bkhd->bhrk", q, k) * scale).masked_fill(~visible, float("-inf"))
    p = (scores - lse.unsqueeze(-1)).exp()
    delta = (d_out * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("brhd,bkhd->bhrk", d_out, v) - delta) * scale
    dq, dk = torch.einsum("bhrk,bkhd->brhd", ds, k), torch.einsum("bhrk,brhd->bkhd", ds, q)
    return dq.to(dtype), dk.to(dtype), torch.einsum("bhrk,brhd->bkhd", p, d_out).to(dtype)


def in_working_dtype(*tensors: Tensor) -> list[Tensor]:
    """In float32 at least, as the kernels keep their sums."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def check_tensors(*tensors: Tensor) -> None:
    """What the kernels ask of memory: sizes above 0, head size a multiple of 8, rows aligned to 16 bytes."""
    for x in tensors:
        assert x.numel() > 0 and x.shape[-1] % HEAD_SIZE_MULTIPLE == 0 and x.stride(-1) == 1
        strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        assert x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in strides)


STANDIN = Provider("a stand-in", forward, backward)


@contextmanager
def used(provider: Provider = STANDIN) -> Iterator[None]:
    """Inside, a provider is the one that backend "flash" finds, on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "reason_against_flash", lambda device, dtype: None)
        patch.setattr(flash_providers, "provider_for", lambda device, dtype=None: provider)
        yield


def recording(log: list) -> Provider:
    """The stand-in, which notes the arguments of every call: ("forward" or "backward", arguments)."""

    def noted(name: str, function: Callable) -> Callable:
        def call(*arguments):
            log.append((name, arguments))
            return function(*arguments)

        return call

    return Provider("a stand-in", noted("forward", forward), noted("backward", backward))


GRADIENTS = "dout q k v out softmax_lse"
FA3_EXTRAS = (
    "k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k "
    "page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale"
)
SHARED = {
    "2.5": "dropout_p softmax_scale causal window_size alibi_slopes",
    "2.6": "dropout_p softmax_scale causal window_size softcap alibi_slopes",
    "2.8": "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes",
}
SIGNATURES = {
    version: (f"q k v {shared} return_softmax", f"{GRADIENTS} dq dk dv {shared} deterministic rng_state=")
    for version, shared in SHARED.items()
} | {
    "3": (
        f"q k v {FA3_EXTRAS} softmax_scale causal window_size= attention_chunk= softcap= rotary_interleaved= "
        "scheduler_metadata= num_splits= pack_gqa= sm_margin=",
        f"{GRADIENTS} cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv softmax_scale "
        "causal window_size= softcap= deterministic= sm_margin=",
    ),
}
"""Arguments of flash_attn_interface's forward and backward pass by version, "=" after those with a default.

2.8 are custom ops as 2.7 had them first, 3 is FlashAttention-3 when its arguments had no defaults yet.
"""
KINDS = {
    "dropout_p": "float", "softmax_scale": "float", "softcap": "float", "causal": "bool", "return_softmax": "bool",
    "deterministic": "bool", "window_size_left": "int", "window_size_right": "int", "alibi_slopes": "Tensor?",
    "rng_state=": "Tensor?", "dq": "Tensor(a0!)?", "dk": "Tensor(a1!)?", "dv": "Tensor(a2!)?",
}  # fmt: skip


def flash_attn(version: str, log: list[dict]) -> SimpleNamespace:
    """flash_attn_interface as a version has it; `log` gets the arguments of each call by name."""

    def window_of(given: dict) -> Window:
        left, right = given.get("window_size") or (given["window_size_left"], given["window_size_right"])
        return Window(left, 0 if given["causal"] else right)

    def run_forward(given: dict) -> tuple:
        q, k, v = given["q"], given["k"], given["v"]
        out, lse = forward(q, k, v, window_of(given), given["softmax_scale"])
        if version < "2.7":
            return out, q, k, v, out, lse, None, None
        return out, lse, *((q.new_empty(0), q.new_empty(2)) if version == "2.8" else (None, None))

    def run_backward(given: dict) -> Tensor:
        tensors = (given[name] for name in GRADIENTS.split())
        results = backward(*tensors, window_of(given), given["softmax_scale"])
        for name, result in zip(("dq", "dk", "dv"), results, strict=True):
            given[name].copy_(result)
        return given["softmax_lse"].clone()

    def function(name: str, arguments: str, body: Callable, returns: str) -> Callable:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([
            inspect.Parameter(x.rstrip("="), kind, default=None if x.endswith("=") else inspect.Parameter.empty)
            for x in arguments.split()
        ])  # fmt: skip

        def call(*args, **kwargs):
            log.append(dict(signature.bind(*args, **kwargs).arguments))
            return body(log[-1])

        call.__signature__, call.__name__ = signature, name
        if version != "2.8":
            return call
        names = [f"{KINDS.get(x, 'Tensor')} {x}{'None' * x.endswith('=')}" for x in arguments.split()]
        changed = ("dq", "dk", "dv") if "dq" in arguments.split() else ()
        schema = f"({', '.join(names)}) -> {returns}"
        return torch.library.custom_op(f"mapet_test_flash::{name}", call, mutates_args=changed, schema=schema)

    ways = zip(
        ("_flash_attn_forward", "_flash_attn_backward"), SIGNATURES[version], (run_forward, run_backward),
        ("(Tensor, Tensor, Tensor, Tensor)", "Tensor"), strict=True,
    )  # fmt: skip
    return SimpleNamespace(**{name: function(name, *way) for name, *way in ways})


class LowerTriangularFromBottomRightMask:
    """xformers' causal bias."""

    window = (-1, 0)


class LowerTriangularFromBottomRightLocalAttentionMask:
    """xformers' causal bias with a window whose size counts the row's own key."""

    def __init__(self, _window_size: int) -> None:
        self.window = (_window_size - 1, 0)


def xformers_fmha() -> SimpleNamespace:
    """xformers.ops.fmha with its FlashAttention operators."""
    causal, local = LowerTriangularFromBottomRightMask, LowerTriangularFromBottomRightLocalAttentionMask
    operator = {"is_available": lambda: True, "SUPPORTED_ATTN_BIAS_TYPES": [type(None), causal, local], "NAME": "fa2"}
    fmha = SimpleNamespace(
        flash=SimpleNamespace(FwOp=SimpleNamespace(**operator), BwOp=SimpleNamespace(**operator)),
        attn_bias=SimpleNamespace(**{kind.__name__: kind for kind in (causal, local)}),
    )

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):  # fmt: skip
        assert op is fmha.flash.FwOp and p == 0.0
        return forward(query, key, value, getattr(attn_bias, "window", (-1, -1)), scale)

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):  # fmt: skip
        assert op is fmha.flash.BwOp and p == 0.0
        return backward(grad, query, key, value, output, lse, getattr(attn_bias, "window", (-1, -1)), scale)

    fmha.memory_efficient_attention_forward_requires_grad = memory_efficient_attention_forward_requires_grad
    fmha.memory_efficient_attention_backward = memory_efficient_attention_backward
    return fmha
