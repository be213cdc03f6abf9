"""The operators of csrc/bindings.cpp on CPU tensors; test_cuda_bindings.py builds them and runs this file.

    python tests/cuda_bindings_cases.py LIBRARY

Prints a line for every op of the registry that was within the error budget, and one for every error: its type and text.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from test_ops import outputs_and_gradients, with_inputs

from mapet_kernels.permuted_embed import op as embed
from mapet_kernels.registry import REGISTRY, OpSpec
from mapet_kernels.two_stream_attention import op as attention

MOST_FLOP = 2e7


def check(spec: OpSpec, dtype: torch.dtype) -> None:
    """Outputs and gradients of the op's small shapes through its backend cuda."""
    for shape in spec.shapes.values():
        if spec.cost(shape, dtype)[0] > MOST_FLOP:
            continue
        case = spec.make_case(shape, dtype)
        exact, exact_gradients = outputs_and_gradients(spec.plain, with_inputs(case, torch.float64), case.options)
        plain, plain_gradients = outputs_and_gradients(spec.plain, with_inputs(case, dtype), case.options)
        actual, gradients = outputs_and_gradients(spec.function, with_inputs(case, dtype), case.options)
        for parts in zip(actual, plain, exact, strict=True):
            assert_within_budget(*parts, factor=FORWARD_FACTOR, what="output")
        for name, gradient in gradients.items():
            parts = gradient, plain_gradients[name], exact_gradients[name]
            assert_within_budget(*parts, factor=GRADIENT_FACTOR, what=f"gradient of {name}")
    print(f"{spec.name} {dtype} is right")


def refused(operator, *arguments) -> None:
    """Print the error that these arguments raise."""
    try:
        operator(*arguments)
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        print(f"{operator} took what it must not")


def refusals() -> None:
    """Arguments of the embedding's operators with one thing wrong in each."""
    ops, tensor = torch.ops.mapet_kernels, torch.zeros
    images, patches, out = tensor(2, 3, 8, 8, dtype=torch.uint8), tensor(2, 4, dtype=torch.int64), tensor(2, 4, 48)
    refused(ops.cuda_permuted_patches, images.int(), patches, out, None, None, 4)
    refused(ops.cuda_permuted_patches, images, patches, out, tensor(3), None, 4)
    refused(ops.cuda_permuted_patches, images, patches.int(), out, None, None, 4)
    refused(ops.cuda_permuted_patches, images, patches, out[:, :3], None, None, 4)
    refused(ops.cuda_permuted_patches, images, patches, out, None, None, 3)
    content, position, token = tensor(2, 4, 6), tensor(5, 6), tensor(6)
    perm, buffer = torch.arange(5).repeat(2, 1), tensor(22, 6)
    assemble = ops.cuda_assemble_streams
    refused(assemble, content, position, token, token, perm, tensor(9, 6), 2, True, True)
    refused(assemble, content, position, token, None, perm, buffer, 2, True, True)
    refused(assemble, content, position.half(), token, token, perm, buffer, 2, True, True)
    refused(assemble, content.mT.contiguous().mT, position, token, token, perm, buffer, 2, True, True)
    refused(ops.cuda_assemble_position_gradient, buffer, perm, position, position.double(), 5, 2, True, True)


def main(library: str) -> None:
    """All cases."""
    torch.ops.load_library(library)
    sys.modules["mapet_kernels._C"] = ModuleType("mapet_kernels._C")
    embed.choose_listed_backend = attention.choose_backend = lambda *_, **__: "cuda"
    for dtype in (torch.float16, torch.float32, torch.float64):
        check(REGISTRY["permuted_embed"], dtype)
    check(REGISTRY["two_stream_attention"], torch.float16)
    refusals()


if __name__ == "__main__":
    main(sys.argv[1])
