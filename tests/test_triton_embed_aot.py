"""The kernels of permuted_embed compiled for GPUs that are not here, in a process without TRITON_INTERPRET."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mapet_kernels.permuted_embed import kernel

def compile_all(dtype, class_token, mask_tokens):
    name = f"*{dtype}"
    flags = {"MASK_TOKENS": mask_tokens, "QUERY_STREAM": True}
    cases = {
        kernel.permuted_patches_kernel: (
            ["*u8", "*i64", name, "*fp32", "*fp32"],
            {"PATCH": 16, "COLUMNS": 768, "BLOCK": 1024, "IS_UINT8": True, "NORMALISE": True, "WORK": tl.float32},
        ),
        kernel.assemble_kernel: ([name] * 4 + ["*i64", name], {"HAS_CLASS": class_token, "BD": 256, **flags}),
        kernel.assemble_position_gradient_kernel: (
            [name, "*i64", name, "*fp32"], {"BD": 64, "WORK": tl.float32, **flags}
        ),
    }
    for function, (pointers, constants) in cases.items():
        names = [n for n in function.arg_names if n not in constants]
        signature = dict(zip(names, pointers + ["i32"] * (len(names) - len(pointers)), strict=True))
        signature |= {n: "constexpr" for n in constants}
        constants = {(function.arg_names.index(n),): v for n, v in constants.items()}
        for architecture in (80, 90):
            source, target = ASTSource(function, signature, constants), GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(source, target=target)
            assert len(compiled.asm["cubin"]) > 0 and compiled.metadata.shared <= 48 * 1024
            print("compiled", function.__name__, dtype, architecture)

compile_all("fp32", True, True)
compile_all("bf16", False, False)
"""


def test_kernels_compile() -> None:
    """Class and mask tokens or neither, in two dtypes, for two GPUs."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-"], input=COMPILE, capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parent.parent, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("compiled") == 3 * 2 * 2
