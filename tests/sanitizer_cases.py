"""Every kernel of the registry, forward and backward, at small awkward shapes: what compute-sanitizer watches.

    python tests/sanitizer_cases.py cuda [MOST_FLOP] [--op NAME] [--part 1/2]

Kernels are Triton's and, where they are built, those in CUDA C++. With cpu for cuda and TRITON_INTERPRET=1 the former
run in Triton's interpreter. Inputs are made on the host and copied.
Exit code 3: a kernel of these ops was never launched.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

import torch
from op_checks import outputs_and_gradients

import mapet_kernels
from mapet_kernels.backends import available_backends
from mapet_kernels.registry import REGISTRY, Case, OpSpec

MOST_FLOP = 2e7
DTYPE = torch.float16
NOT_LAUNCHED = 3


def kernel_modules(op: str | None = None) -> list[ModuleType]:
    """The kernel.py of an op, or of every op that has one."""
    found = [module.name for module in pkgutil.walk_packages(mapet_kernels.__path__, "mapet_kernels.")]
    wanted = "" if op is None else f"mapet_kernels.{op}."
    return [importlib.import_module(name) for name in found if name.endswith(".kernel") and name.startswith(wanted)]


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


def cases(device: str, most_flop: float, op: str | None = None, part: str = "1/1") -> list[tuple[OpSpec, str, str]]:
    """Ops with kernels or one of them, their backends, and the names of their shapes of at most so many operations.

    part: "1/2" is every other case, "2/2" the others.
    """
    built = available_backends(device, DTYPE)["cuda"] is None
    found = [
        (spec, backend, name)
        for spec in REGISTRY.values()
        if op in (None, spec.name)
        for backend in ("triton", "cuda")
        if backend in (*spec.backends, *spec.gpu_backends) and (backend == "triton" or built)
        for name, shape in spec.shapes.items()
        if spec.cost(shape, DTYPE)[0] <= most_flop
    ]
    number, parts = map(int, part.split("/"))
    return found[number - 1 :: parts]


def copied(case: Case, device: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inputs, as leaves where they have gradients, and options, on a device."""
    inputs = {name: x.to(device) for name, x in case.inputs.items()}
    for name in inputs.keys() - set(case.fixed):
        inputs[name].requires_grad_()
    return inputs, {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}


def main(device: str, most_flop: float, op: str | None, part: str) -> int:
    """Run the cases; returns the exit code."""
    launched: set[str] = set()
    kernels = [(module, name) for module in kernel_modules(op) for name in kernel_names([module])]
    for module, name in kernels:
        # Two ops have kernels of the same name.
        setattr(module, name, Recorded(getattr(module, name), f"{module.__name__.split('.')[1]}.{name}", launched))
    names = [getattr(module, name).name for module, name in kernels]
    for spec, backend, shape in cases(device, most_flop, op, part):
        print(f"case: {spec.name}, shape {shape}, backend {backend}", flush=True)
        inputs, options = copied(spec.make_case(spec.shapes[shape], DTYPE), device)
        out, gradients = outputs_and_gradients(spec.function, inputs, options, backend=backend)
        if not all(torch.isfinite(x).all() for x in (*out, *gradients.values()) if x.is_floating_point()):
            raise RuntimeError(f"{spec.name}, shape {shape}, backend {backend}: a result is not finite")
    print("launched:", *sorted(launched))
    if missing := sorted(set(names) - launched):
        print("never launched:", *missing)
        return NOT_LAUNCHED
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("most_flop", nargs="?", type=float, default=MOST_FLOP, help="of a case, at most")
    parser.add_argument("--op", choices=list(REGISTRY), help="cases of this op alone")
    parser.add_argument("--part", default="1/1", help="the first of two parts is 1/2")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    sys.exit(main(given.device, given.most_flop, given.op, given.part))
