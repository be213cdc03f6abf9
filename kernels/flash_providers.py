"""FlashAttention from whoever has it: one call, forward and backward, through the first provider that works here.

A call attends R rows to K keys, all images and heads at once, under one window (left, right) aligned to the bottom
right: row i sees keys [i + K - R - left, i + K - R + right], -1 for no limit. That is flash-attn's own rule.

    flash_attn_interface   package FlashAttention-3, Hopper only
    flash_attn             package flash-attn, 2.5 to 2.8: arguments are bound by name, since their order has changed
    torch                  torch's own FlashAttention-2, which needs no other package
    xformers               its FlashAttention operators; they have no deterministic backward pass

All take float16 and bfloat16 on compute capability 8.0 or newer, head sizes that are multiples of 8 up to 256, and give
natural log-sum-exps (B, H, R) in fp32, so that one may do the forward pass and another the backward pass. They do not
agree on a row that sees nothing (flash-attn says +inf): give them none.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Called = TypeVar("Called", bound=Callable[..., Any])

MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 8
DTYPES = (torch.float16, torch.bfloat16)


class Window(NamedTuple):
    """Keys a row sees left and right of the one it is aligned to; -1 is no limit."""

    left: int
    right: int


DENSE = Window(-1, -1)
CAUSAL = Window(-1, 0)


@dataclass(frozen=True)
class Provider:
    """Attention of q (B, R, H, D) to k, v (B, K, H, D): every last dimension contiguous, rows aligned to 16 bytes.

    forward: (q, k, v, window, scale) -> out (B, R, H, D), lse (B, H, at least R).
    backward: (d_out, q, k, v, out, lse (B, H, R) contiguous, window, scale) -> dq, dk, dv.
    name: what a person calls it, with its version.
    only: compute capability major versions it runs on; empty for all.
    deterministic: whether the backward pass can repeat bit for bit.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Window, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    only: tuple[int, ...] = ()
    deterministic: bool = True


@dataclass(frozen=True)
class Machine:
    """What the choice of a provider depends on."""

    device_type: str
    cuda_found: bool = True
    rocm: bool = False
    capability: tuple[int, int] = (0, 0)
    deterministic: bool = False
    """Whether torch.use_deterministic_algorithms is on."""


def provider_for(device: torch.device | str, dtype: torch.dtype | None = None) -> Provider:
    """The provider of FlashAttention for tensors on `device` in `dtype`.

    Raises:
        ValueError: there is none; the text says why.
    """
    found = choose_provider(describe(torch.device(device)), dtype)
    if isinstance(found, str):
        raise ValueError(f"backend 'flash' cannot run here: {found}")
    return found


def constant_in_graphs(function: Called) -> Called:
    """As torch.compiler.assume_constant_result, which would load the compiler with every import: two seconds."""
    function._dynamo_marked_constant = True
    return function


@constant_in_graphs
def reason_against_flash(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why no provider of FlashAttention runs on this device (in this dtype), or None."""
    found = choose_provider(describe(device), dtype)
    return found if isinstance(found, str) else None


def describe(device: torch.device) -> Machine:
    """The machine behind a device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Machine(device.type, cuda_found=False)
    capability = torch.cuda.get_device_capability(device)
    return Machine(
        "cuda", True, torch.version.hip is not None, capability, torch.are_deterministic_algorithms_enabled()
    )


def choose_provider(
    machine: Machine,
    dtype: torch.dtype | None,
    names: Iterable[str] | None = None,
    load: Callable[[str], Provider | str] | None = None,
) -> Provider | str:
    """The first provider that works on the machine in `dtype` (None: in some dtype), or the reason why none does.

    Args:
        names, load: providers in order, and what gives a provider or the reason against it by its name.
    """
    if machine.device_type != "cuda":
        return f"needs a CUDA device, not {machine.device_type}"
    if dtype is not None and dtype not in DTYPES:
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not machine.cuda_found:
        return "torch finds no CUDA device"
    if machine.rocm:
        return "needs CUDA, this torch is built for ROCm"
    if machine.capability < (8, 0):
        major, minor = machine.capability
        return f"needs compute capability 8.0 or newer, this device has {major}.{minor}"
    reasons = []
    for name in LOADERS if names is None else names:
        found = (load_provider if load is None else load)(name)
        reason = found if isinstance(found, str) else _reason_against(found, machine)
        if reason is None:
            return found
        reasons.append(f"{name}: {reason}")
    return f"no provider of FlashAttention: {'; '.join(reasons)}"


def _reason_against(provider: Provider, machine: Machine) -> str | None:
    if provider.only and machine.capability[0] not in provider.only:
        return f"runs on compute capability {', '.join(f'{major}.x' for major in provider.only)} only"
    if machine.deterministic and not provider.deterministic:
        return "has no deterministic backward pass, and torch.use_deterministic_algorithms is on"
    return None


@functools.cache
def load_provider(name: str) -> Provider | str:
    """The provider of a name in LOADERS, or why it cannot be used: not installed, or of a version we do not know."""
    if name != "torch" and importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return LOADERS[name]()
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"cannot be used: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


# flash-attn and FlashAttention-3. Every argument that any known version has, and what a call without extras gives it.
NO_EXTRAS: dict[str, Any] = {
    "dropout_p": 0.0,
    "softcap": 0.0,
    "return_softmax": False,
    "deterministic": True,
    **dict.fromkeys(
        (
            *("alibi_slopes", "rng_state", "k_new", "v_new", "qv", "out", "out_", "cu_seqlens_q", "cu_seqlens_k"),
            *("cu_seqlens_k_new", "seqused_q", "seqused_k", "sequed_q", "sequed_k", "max_seqlen_q", "max_seqlen_k"),
            *("page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary"),
            *("q_descale", "k_descale", "v_descale"),
        )
    ),
}


def flash_attn_provider(module: Any, name: str, only: tuple[int, ...] = ()) -> Provider:
    """A provider over `_flash_attn_forward` and `_flash_attn_backward` of a flash_attn_interface module.

    Raises:
        ImportError: their arguments are not those of a version we know.
    """
    forward_names = _bind(module._flash_attn_forward, ("q", "k", "v", "softmax_scale"))
    backward_names = _bind(
        module._flash_attn_backward,
        ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "softmax_scale", "deterministic"),
    )

    def forward(q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> tuple[Tensor, Tensor]:
        values = _shared_arguments(window, scale) | {"q": q, "k": k, "v": v}
        results = module._flash_attn_forward(**{argument: values[argument] for argument in forward_names})
        # 2.5 and 2.6 return out, q, k, v, padded out, lse, ...; later versions out, lse, ...
        return (results[4], results[5]) if len(results) == 8 else (results[0], results[1])

    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: Window, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        values = _shared_arguments(window, scale) | {
            "dout": d_out,
            "q": q,
            "k": k,
            "v": v,
            "dq": dq,
            "dk": dk,
            "dv": dv,
        }
        values |= {"out": out, "softmax_lse": lse}
        module._flash_attn_backward(**{argument: values[argument] for argument in backward_names})
        return dq, dk, dv

    return Provider(name, forward, backward, only)


def _shared_arguments(window: Window, scale: float) -> dict[str, Any]:
    causal = window == CAUSAL
    return NO_EXTRAS | {
        "softmax_scale": scale,
        "causal": causal,
        "is_causal": causal,
        "window_size": tuple(window),
        "window_size_left": window.left,
        "window_size_right": window.right,
    }


def _bind(function: Any, needed: Sequence[str]) -> tuple[str, ...]:
    """Names of the arguments to give to `function`: all it has that we know.

    Raises:
        ImportError: it lacks one of `needed` or a window, or wants one that we do not know.
    """
    # From 2.7 on these are custom ops, whose own signature is (*args, **kwargs).
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
    known = {*needed, *_shared_arguments(DENSE, 1.0)}
    wanted = [name for name, p in parameters.items() if p.default is p.empty and name not in known]
    missing = [name for name in needed if name not in parameters]
    if not {"window_size", "window_size_left"} & parameters.keys():
        missing.append("window_size")
    if wanted or missing:
        name = getattr(function, "__name__", None) or getattr(function, "_name", "the function")
        complaints = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"wants {', '.join(wanted)}"] * bool(wanted)
        raise ImportError(f"an unknown version: {name} {' and '.join(complaints)}")
    return tuple(name for name in parameters if name in known)


def _load_flash_attn() -> Provider:
    package = importlib.import_module("flash_attn")
    module = importlib.import_module("flash_attn.flash_attn_interface")
    return flash_attn_provider(module, f"flash_attn {getattr(package, '__version__', '(version unknown)')}")


def _load_flash_attn_3() -> Provider:
    module = importlib.import_module("flash_attn_interface")
    return flash_attn_provider(module, "flash_attn_interface (FlashAttention-3)", only=(9,))


def torch_provider() -> Provider:
    """A provider over torch's own operators.

    Raises:
        ImportError: this torch is built without FlashAttention, or its operators take no windows.
    """
    if not torch.backends.cuda.is_flash_attention_available():
        raise ImportError("this torch is built without FlashAttention")
    run_forward = torch.ops.aten._flash_attention_forward.default
    run_backward = torch.ops.aten._flash_attention_backward.default
    for operator in (run_forward, run_backward):
        arguments = [argument.name for argument in operator._schema.arguments]
        if not {"scale", "window_size_left", "window_size_right"} <= set(arguments):
            raise ImportError(f"{operator._schema.name} of torch {torch.__version__} takes no windows")

    def forward(q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> tuple[Tensor, Tensor]:
        sizes = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = run_forward(q, k, v, *sizes, 0.0, window == CAUSAL, False, scale=scale, **_torch_window(window))
        return out, lse

    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: Window, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (None, None, q.shape[1], k.shape[1])
        no_rng = torch.empty(0, device=q.device)  # the random state, which only dropout reads
        return run_backward(
            *(d_out, q, k, v, out, lse, *sizes, 0.0, window == CAUSAL, no_rng, no_rng),
            scale=scale,
            **_torch_window(window),
        )

    return Provider(f"torch {torch.__version__}'s FlashAttention-2", forward, backward)


def _torch_window(window: Window) -> dict[str, int]:
    return {"window_size_left": window.left, "window_size_right": window.right}


def xformers_provider(fmha: Any, version: str) -> Provider:
    """A provider over the FlashAttention operators of xformers.ops.fmha. (Its CUTLASS backward takes no windows.)

    Raises:
        ImportError: this xformers has no FlashAttention, or its operators take no windows.
    """
    forward_operator, backward_operator = fmha.flash.FwOp, fmha.flash.BwOp
    if not (forward_operator.is_available() and backward_operator.is_available()):
        raise ImportError(f"xformers {version} is built without FlashAttention")
    needed = {type(xformers_bias(fmha, window)) for window in (DENSE, CAUSAL, Window(1, 0))}
    for operator in (forward_operator, backward_operator):
        if not needed <= set(operator.SUPPORTED_ATTN_BIAS_TYPES):
            raise ImportError(f"xformers {version} takes no windows in {operator.NAME}")

    def forward(q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> tuple[Tensor, Tensor]:
        return fmha.memory_efficient_attention_forward_requires_grad(
            q, k, v, attn_bias=xformers_bias(fmha, window), scale=scale, op=forward_operator
        )

    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: Window, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return fmha.memory_efficient_attention_backward(
            d_out, out, lse, q, k, v, attn_bias=xformers_bias(fmha, window), scale=scale, op=backward_operator
        )

    return Provider(f"xformers {version}", forward, backward, deterministic=False)


def xformers_bias(fmha: Any, window: Window) -> Any:
    """The attention bias of xformers that is a window; None where there is no limit."""
    if window == DENSE:
        return None
    if window == CAUSAL:
        return fmha.attn_bias.LowerTriangularFromBottomRightMask()
    if window.right != 0:
        raise ValueError(f"xformers' windows end at the aligned key, got {window}")
    return fmha.attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(window.left + 1)  # its size counts the key


def _load_xformers() -> Provider:
    package = importlib.import_module("xformers")
    return xformers_provider(importlib.import_module("xformers.ops.fmha"), package.__version__)


LOADERS: dict[str, Callable[[], Provider]] = {
    "flash_attn_interface": _load_flash_attn_3,
    "flash_attn": _load_flash_attn,
    "torch": torch_provider,
    "xformers": _load_xformers,
}
"""Providers in the order they are tried."""
