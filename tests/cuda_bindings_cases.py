"""The operators of csrc/bindings.cpp on CPU tensors; test_cuda_compile.py builds them and runs this file.

    python tests/cuda_bindings_cases.py LIBRARY

Prints a line for every op of the registry that was within the error budget, and one for every error: its type and text.
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType

import torch
from op_checks import check, flop

from mapet_kernels.kmeans_assign import op as kmeans
from mapet_kernels.permuted_embed import op as embed
from mapet_kernels.registry import REGISTRY
from mapet_kernels.two_stream_attention import op as attention

MOST_FLOP = 2e7
DTYPES = {
    "permuted_embed": (torch.float16, torch.float32, torch.float64),
    "two_stream_attention": (torch.float16,),
    "kmeans_assign": (torch.float16, torch.bfloat16, torch.float32),
}


def check_small(name: str, dtype: torch.dtype) -> None:
    """The small shapes of an op through its backend cuda; of the assignment also the fast mode, near the exact one."""
    spec = REGISTRY[name]
    for shape in spec.shapes:
        if flop(spec, shape) > MOST_FLOP:
            continue
        case = spec.make_case(spec.shapes[shape], dtype)
        results = check(spec, case, dtype)
        if name == "kmeans_assign":
            _, fast = spec.function(**case.inputs, **case.options, exact=False)
            assert torch.all(fast <= 1.05 * results[1])
    print(f"{name} {dtype} is right")


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


def assignment() -> dict[str, object]:
    """What the operator of kmeans_assign takes: 2 groups of 5 rows and 128 centroids of 32 features, one share."""
    tensor, half = torch.zeros, torch.float16
    rows, centroids, scale, bias = tensor(10, 32, dtype=half), tensor(256, 32, dtype=half), tensor(10), tensor(256)
    bounds, ids, reach = tensor(4, 3, 10), tensor(4, 3, 10, dtype=torch.int32), tensor(4, 10)
    return {
        "rows": rows, "scale": scale, "radius": scale, "centroids": centroids, "bias": bias, "slope": bias,
        "slack": bias, "bounds": bounds, "ids": ids, "reach": reach, "groups": 2, "n": 5, "shares": 1,
    }  # fmt: skip


def assignment_refusals() -> None:
    """The same for the operator of kmeans_assign."""
    tensor, half, right = torch.zeros, torch.float16, assignment()
    rows, centroids, bias, bounds = (right[name] for name in ("rows", "centroids", "bias", "bounds"))
    for wrong in (
        {"rows": rows.float()},
        {"rows": rows.T.contiguous().T},
        {"rows": rows[0]},
        {"rows": tensor(10, 36, dtype=half)[:, :32]},
        {"centroids": centroids[:, :16]},
        {"centroids": tensor(200, 32, dtype=half), "bias": bias[:200], "slope": bias[:200], "slack": bias[:200]},
        {"scale": right["scale"][:9]},
        {"slope": None},
        {"bounds": bounds[:, :1]},
        {"ids": right["ids"].long()},
        {"groups": 3},
        {"shares": 2},
    ):
        refused(torch.ops.mapet_kernels.cuda_assign_scores, *(right | wrong).values())


def attention_refusals() -> None:
    """Cuts that leave more targets than there are query rows, or none."""
    for cut in (1, 5):
        refused(torch.ops.mapet_kernels.cuda_two_stream_forward, *forward_arguments(cut))


def forward_arguments(cut: int) -> tuple:
    """N 5, T 3, one head of size 8, the query stream alone."""
    query, keys = torch.zeros(1, 3, 1, 8, dtype=torch.float16), torch.zeros(1, 8, 1, 8, dtype=torch.float16)
    return None, query, keys, keys, None, query.clone(), None, torch.zeros(1, 3, 1), 5, cut, None, None, True, 1.0


def failing_launches(library: str) -> None:
    """Every operator on arguments that are right, where the runtime does not take the launch, for a reason."""
    ops, tensor = torch.ops.mapet_kernels, torch.zeros
    perm, buffer, token = torch.arange(5).repeat(2, 1), tensor(22, 6), tensor(6)
    ctypes.CDLL(library).fail_launches(2)
    images = tensor(2, 3, 8, 8, dtype=torch.uint8)
    refused(ops.cuda_permuted_patches, images, perm[:, :4].contiguous(), tensor(2, 4, 48), None, None, 4)
    refused(ops.cuda_assemble_streams, tensor(2, 4, 6), tensor(5, 6), token, token, perm, buffer, 2, True, True)
    gradients = tensor(5, 6), tensor(5, 6)
    refused(ops.cuda_assemble_position_gradient, buffer, perm, *gradients, 5, 2, True, True)
    refused(ops.cuda_assign_scores, *assignment().values())
    refused(ops.cuda_two_stream_forward, *forward_arguments(2))


def main(library: str) -> None:
    """All cases."""
    torch.ops.load_library(library)
    sys.modules["mapet_kernels._C"] = ModuleType("mapet_kernels._C")
    embed.choose_listed_backend = kmeans.choose_listed_backend = lambda *_, **__: "cuda"
    attention.choose_backend = lambda *_, **__: "cuda"
    for name, dtypes in DTYPES.items():
        for dtype in dtypes:
            check_small(name, dtype)
    refusals()
    assignment_refusals()
    attention_refusals()
    failing_launches(library)


if __name__ == "__main__":
    main(sys.argv[1])
