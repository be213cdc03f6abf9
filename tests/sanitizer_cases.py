"""Every kernel of the registry, forward and backward, at small awkward shapes: what compute-sanitizer watches.

    python tests/sanitizer_cases.py cuda [MOST_FLOP]

Kernels are Triton's and, where they are built, those in CUDA C++. With cpu for cuda and TRITON_INTERPRET=1 the former
run in Triton's interpreter. Inputs are made on the host and copied.
Exit code 3: a kernel was never launched.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

import torch
from test_ops import outputs_and_gradients

import mapet_kernels
from mapet_kernels.backends import available_backends
from mapet_kernels.registry import REGISTRY, Case, OpSpec

MOST_FLOP = 2e7
DTYPE = torch.float16
NOT_LAUNCHED = 3


def kernel_modules() -> list[ModuleType]:
    """The kernel.py of every op that has one."""
    found = pkgutil.walk_packages(mapet_kernels.__path__, "mapet_kernels.")
    return [importlib.import_module(module.name) for module in found if module.name.endswith("kernel")]


def kernel_names(modules: list[ModuleType]) -> list[str]:
    """Names of the kernels that are launched; those with an underscore in front are parts of them."""
    return [name for module in modules for name in vars(module) if name.endswith("_kernel") and name[0] != "_"]


class Recorded:
    """A kernel that notes its name when it is launched."""

    def __init__(self, kernel: Any, name: str, launched: set[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.add(self.name)
        return self.kernel[grid]


def cases(device: str, most_flop: float) -> list[tuple[OpSpec, str, str]]:
    """Ops with kernels, their backends, and the names of their shapes that take at most so many operations."""
    built = available_backends(device, DTYPE)["cuda"] is None
    return [
        (spec, backend, name)
        for spec in REGISTRY.values()
        for backend in ("triton", "cuda")
        if backend in (*spec.backends, *spec.gpu_backends) and (backend == "triton" or built)
        for name, shape in spec.shapes.items()
        if spec.cost(shape, DTYPE)[0] <= most_flop
    ]


def copied(case: Case, device: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inputs, as leaves where they have gradients, and options, on a device."""
    inputs = {name: x.to(device) for name, x in case.inputs.items()}
    for name in inputs.keys() - set(case.fixed):
        inputs[name].requires_grad_()
    return inputs, {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}


def main(device: str, most_flop: float = MOST_FLOP) -> int:
    """Run all cases; returns the exit code."""
    modules, launched = kernel_modules(), set()
    names = kernel_names(modules)
    for module in modules:
        for name in kernel_names([module]):
            setattr(module, name, Recorded(getattr(module, name), name, launched))
    for spec, backend, shape in cases(device, most_flop):
        inputs, options = copied(spec.make_case(spec.shapes[shape], DTYPE), device)
        out, gradients = outputs_and_gradients(spec.function, inputs, options, backend=backend)
        if not all(torch.isfinite(x).all() for x in (*out, *gradients.values()) if x.is_floating_point()):
            raise RuntimeError(f"{spec.name}, shape {shape}, backend {backend}: a result is not finite")
    print("launched:", *sorted(launched))
    if missing := sorted(set(names) - launched):
        print("never launched:", *missing)
        return NOT_LAUNCHED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(float, sys.argv[2:])))
