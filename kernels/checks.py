"""Checks that the ops share; every text says what was given and what is allowed."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRACING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
"""Dispatch modes under which tensors have no values: fake tensors, and torch.fx's tracing."""

Shapes = dict[str, torch.Size]
"""Shapes of tensors by the names of their arguments."""


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless the tensors share one floating-point dtype (TypeError) and one device (ValueError).

    Under autocast the dtypes may differ: the op casts them. Forward-mode derivatives are an error (ValueError): torch
    would take those of a custom op for zero.
    """
    names = ", ".join(tensors)
    dtypes, devices = [t.dtype for t in tensors.values()], [t.device for t in tensors.values()]
    mixed = len(set(dtypes)) > 1 and not torch.is_autocast_enabled(devices[0].type)
    if mixed or not all(dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"{names} must share one floating-point dtype, got {', '.join(map(str, dtypes))}")
    if len(set(devices)) > 1:
        raise ValueError(f"{names} must be on one device, got {', '.join(map(str, devices))}")
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        for name, tensor in tensors.items():
            if forward_ad.unpack_dual(tensor).tangent is not None:
                raise ValueError(f"{name} has a tangent, but the op has no forward-mode derivative (jvp): use backward")


def check_is_tensor(**values: object) -> None:
    """Raise TypeError unless every value is a torch.Tensor; the text says how what was given becomes one."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type_name(value)}{how_to_make_a_tensor(name, value)}")


def check_device(device: torch.device, **tensors: Tensor) -> None:
    """Raise ValueError unless the tensors are on the device of the op, or on the CPU, from where the op moves them."""
    for name, tensor in tensors.items():
        if tensor.device != device and tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be on the device of the other tensors, {device}, or on the CPU, got {tensor.device}: "
                f"{name}.to({str(device)!r})"
            )


def check_integer(name: str, value: object, allowed: str = "an int") -> int:
    """The value as an int (numpy's integers are made one), or TypeError: bool and float are not taken for one."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | numbers.Integral):
        raise TypeError(f"{name} must be {allowed}, got {_described(value)}")
    return value if isinstance(value, int | torch.SymInt) else int(value)


def check_cut(cut: object, batch: int, device: torch.device) -> int | Tensor:
    """The cut as an int, or as integers (B,), or TypeError / ValueError. Its values are not looked at."""
    allowed = "an int or an integer tensor (B,)"
    if advice := how_to_make_a_tensor("cut", cut):
        raise TypeError(f"cut must be {allowed}, got {type_name(cut)}{advice}")
    if not isinstance(cut, Tensor):
        return check_integer("cut", cut, allowed)
    if cut.shape != (batch,) or not is_integer(cut):
        advice = ": int(cut) is one cut for all images" if cut.dim() == 0 else ""
        raise ValueError(
            f"cut must be an int or integers (B,) = ({batch},), got {cut.dtype} {tuple(cut.shape)}{advice}"
        )
    check_device(device, cut=cut)
    return cut


def check_scale(scale: object, size: int) -> float:
    """The factor of the scores as a float, size ** -0.5 where it is None; TypeError or ValueError unless it is > 0."""
    if scale is None:
        return size**-0.5
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor, which would get no gradient: multiply q by it instead")
    if isinstance(scale, bool) or not isinstance(scale, float | int | torch.SymFloat | torch.SymInt | numbers.Real):
        raise TypeError(f"scale must be a number, got {_described(scale)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and > 0 (None is head size ** -0.5 = {size**-0.5:.4g}), got {scale}")
    return float(scale)


def check_permutations(name: str, order: Tensor) -> None:
    """Raise ValueError unless each row of integers (B, N) holds 0..N-1 once. Looks only where `is_readable`."""
    if not is_readable(order) or order.numel() == 0:
        return
    order, tokens = order.long(), order.shape[1]
    low, high = map(int, torch.aminmax(order))
    if low >= 0 and high < tokens:
        true = order.new_ones((), dtype=torch.bool).expand_as(order)  # a scalar is scattered at half the speed
        if order.new_zeros(order.shape, dtype=torch.bool).scatter_(1, order, true).all():
            return
    image, flaw = next((i, flaw) for i, row in enumerate(order.tolist()) if (flaw := _flaw_of_permutation(row)))
    raise ValueError(
        f"{name} must hold every number from 0 to {tokens - 1} once per image, but image {image} has {flaw}"
    )


def _flaw_of_permutation(row: list[int]) -> str | None:
    ranks: dict[int, int] = {}
    for rank, token in enumerate(row):
        if not 0 <= token < len(row):
            return f"{token} at rank {rank}"
        if token in ranks:
            return f"{token} at ranks {ranks[token]} and {rank}"
        ranks[token] = rank
    return None


def is_readable(x: Tensor) -> bool:
    """Whether x has values, and reading them is free: on a CPU, and not while a graph is traced."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # Fake, functional and distributed tensors are subclasses; those inside vmap hide that they are many.
    return (
        type(x) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch.jit.is_tracing()
        and all(torch._C._get_dispatch_mode(mode) is None for mode in TRACING_MODES)
    )


def is_integer(x: Tensor) -> bool:
    """Whether x holds integers (bool is not one)."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def advice_to_transpose(shapes: Shapes, misfit: Callable[[Shapes], str | None]) -> str:
    """What to add to an error text where the shapes (B, H, rows, D) of some tensors keep them from fitting.

    Args:
        shapes: those that do not fit.
        misfit: says what keeps shapes from fitting, None where they fit.
    """
    names = [name for name, shape in shapes.items() if len(shape) == 4]
    fewer = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names)))
    for some in (names, *fewer):
        swapped = {name: torch.Size([s[0], s[2], s[1], s[3]]) if name in some else s for name, s in shapes.items()}
        if misfit(swapped) is None:
            return (
                f". With dimensions 1 and 2 of {', '.join(some)} swapped the shapes fit: rows come before heads here, "
                "and (B, H, rows, D) needs transpose(1, 2)"
            )
    return ""


def type_name(value: object) -> str:
    """The type of a value as a caller writes it: "float", "numpy.ndarray"."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def how_to_make_a_tensor(name: str, value: object) -> str:
    """Advice for an error text; empty where the value is no array of numbers."""
    if type_name(value) == "numpy.ndarray":
        return f": torch.from_numpy({name})"
    return f": torch.tensor({name})" if isinstance(value, list | tuple) else ""


def _described(value: object) -> str:
    """What was given where a number is wanted."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type_name(value)} {value}"


def check_floating(name: str, values: Tensor) -> None:
    """Raise TypeError unless the tensor is float16, bfloat16, float32 or float64."""
    if values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {values.dtype}")


def check_finite_rows(name: str, values: Tensor) -> None:
    """Raise ValueError that names the first rows holding NaN or infinity. Waits for the device."""
    # The bounds of all take no memory and little time; row by row is only for the message.
    if values.numel() == 0 or all_finite(values):
        return
    bad = (~torch.linalg.vector_norm(values, ord=math.inf, dim=-1).isfinite()).nonzero().tolist()
    raise ValueError(not_finite(name, len(bad), [row[0] if len(row) == 1 else tuple(row) for row in bad]))


def all_finite(values: Tensor) -> bool:
    """Whether a tensor that is not empty holds neither NaN nor infinity. Waits for the device."""
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(values)).tolist())


def not_finite(name: str, count: int, rows: Sequence[object]) -> str:
    """The text for `count` rows that hold NaN or infinity; it names the first of them."""
    first = ", ".join(map(str, rows[:5]))
    return (
        f"{name} must be finite, but {count} of its rows hold NaN or infinity; the first are {first}; "
        "drop or repair them"
    )
