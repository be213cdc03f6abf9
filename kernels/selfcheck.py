"""Does a backend agree with plain torch on this very device? A second's check before hours of training trust it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, used_budget


@dataclass(frozen=True)
class Agreement:
    """Largest errors against float64, as parts of the budget in mapet_kernels/tolerances.py: at most 1 is right."""

    outputs: float
    gradients: float

    @property
    def holds(self) -> bool:
        """Whether both are within the budget."""
        return max(self.outputs, self.gradients) <= 1


def two_stream_agreement(
    backend: str, device: torch.device | str, dtype: torch.dtype, shape: TwoStreamShape | None = None
) -> Agreement:
    """Run two-stream attention forward and backward on random input and compare with plain torch in float64.

    Args:
        shape: MaPeT's at head size 64 when not given.

    Raises:
        ValueError: the backend cannot run on the device in the dtype; the text says why.
    """
    spec = REGISTRY["two_stream_attention"]
    case = spec.make_case(shape or TwoStreamShape(197, 50, size=64), dtype, str(device))
    actual = _run(spec.function, case.inputs, case.options | {"backend": backend})
    plain = _run(spec.plain, case.inputs, case.options)
    exact = _run(spec.plain, {name: x.double() for name, x in case.inputs.items()}, case.options)
    return Agreement(*(
        max(used_budget(a, p, e, factor) for a, p, e in zip(*parts, strict=True))
        for factor, *parts in zip((FORWARD_FACTOR, GRADIENT_FACTOR), actual, plain, exact, strict=True)
    ))  # fmt: skip


def _run(function, inputs: dict[str, Tensor], options: dict) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of their sum with weights that are the same in every dtype."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = [out for out in function(**leaves, **options) if out is not None]
    weights = [torch.arange(out.numel(), device=out.device).cos().view_as(out).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return [out.detach() for out in outputs], list(gradients)
