"""Stand-ins for FlashAttention on CPU tensors: its documented rules in plain torch, and its packages as they were."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

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
    scores = (torch.einsum("brhd,bkhd->bhrk", q, k) * scale).masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhrk,bkhd->brhd", scores.softmax(-1), v)
    return out, F.pad(lse, (0, -lse.shape[-1] % LSE_PADDING), value=float("nan"))


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the output and log-sum-exp that are given: no softmax is computed again."""
    check_tensors(d_out, q, k, v, out)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.is_contiguous()
    visible = sees(q.shape[1], k.shape[1], window)
    scores = (torch.einsum("brhd,bkhd->bhrk", q, k) * scale).masked_fill(~visible, float("-inf"))
    p = (scores - lse.unsqueeze(-1)).exp()
    delta = (d_out * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("brhd,bkhd->bhrk", d_out, v) - delta) * scale
    dq, dk = torch.einsum("bhrk,bkhd->brhd", ds, k), torch.einsum("bhrk,brhd->bkhd", ds, q)
    return dq, dk, torch.einsum("bhrk,brhd->bkhd", p, d_out)


def check_tensors(*tensors: Tensor) -> None:
    """What the kernels ask of memory: sizes above 0, head size a multiple of 8, rows aligned to 16 bytes."""
    for x in tensors:
        assert x.numel() > 0 and x.shape[-1] % HEAD_SIZE_MULTIPLE == 0 and x.stride(-1) == 1
        strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        assert x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in strides)


STANDIN = Provider("a stand-in", forward, backward)


def recording(log: list) -> Provider:
    """The stand-in, which notes the arguments of every call: ("forward" or "backward", arguments)."""

    def noted(name: str, function: Callable) -> Callable:
        def call(*arguments):
            log.append((name, arguments))
            return function(*arguments)

        return call

    return Provider("a stand-in", noted("forward", forward), noted("backward", backward))


def _window(causal: bool, left: int, right: int) -> Window:
    return Window(left, 0 if causal else right)


def flash_attn_2_5(log: list[dict]) -> SimpleNamespace:
    """flash_attn_interface as 2.5 has it; `log` gets the arguments of each call by name."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax
    ):  # fmt: skip
        log.append(locals() | {"log": None})
        out, lse = forward(q, k, v, _window(causal, *window_size), softmax_scale)
        return out, q, k, v, out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        log.append(locals() | {"log": None})
        _fill(dq, dk, dv, backward(dout, q, k, v, out, softmax_lse, _window(causal, *window_size), softmax_scale))
        return dq, dk, dv, softmax_lse

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def flash_attn_2_6(log: list[dict]) -> SimpleNamespace:
    """flash_attn_interface as 2.6 has it: softcap after the window."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
    ):  # fmt: skip
        log.append(locals() | {"log": None})
        out, lse = forward(q, k, v, _window(causal, *window_size), softmax_scale)
        return out, q, k, v, out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        log.append(locals() | {"log": None})
        _fill(dq, dk, dv, backward(dout, q, k, v, out, softmax_lse, _window(causal, *window_size), softmax_scale))
        return dq, dk, dv, softmax_lse

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def flash_attn_2_8(log: list[dict]) -> SimpleNamespace:
    """flash_attn_interface as 2.7 and 2.8 have it: custom ops with the window in two arguments."""

    @torch.library.custom_op("mapet_test_flash::forward_2_8", mutates_args=())
    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        log.append(locals() | {"log": None})
        out, lse = forward(q, k, v, _window(causal, window_size_left, window_size_right), softmax_scale)
        return out, lse, q.new_empty(0), q.new_empty(2)

    @torch.library.custom_op("mapet_test_flash::backward_2_8", mutates_args=("dq", "dk", "dv"))
    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
        dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
        deterministic: bool, rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        log.append(locals() | {"log": None})
        window = _window(causal, window_size_left, window_size_right)
        _fill(dq, dk, dv, backward(dout, q, k, v, out, softmax_lse, window, softmax_scale))
        return softmax_lse.clone()

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def flash_attn_3(log: list[dict]) -> SimpleNamespace:
    """FlashAttention-3's flash_attn_interface when its arguments had no defaults yet."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        log.append(locals() | {"log": None})
        out, lse = forward(q, k, v, _window(causal, *window_size), softmax_scale)
        return out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        log.append(locals() | {"log": None})
        _fill(dq, dk, dv, backward(dout, q, k, v, out, softmax_lse, _window(causal, *window_size), softmax_scale))
        return dq, dk, dv, softmax_lse

    return SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)


def _fill(dq: Tensor, dk: Tensor, dv: Tensor, results: tuple[Tensor, Tensor, Tensor]) -> None:
    for target, result in zip((dq, dk, dv), results, strict=True):
        target.copy_(result)


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
