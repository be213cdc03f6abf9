"""The embedding kernels' own source, compiled for the CPU, as the operators of csrc/bindings.cpp for CPU tensors.

So the backend's Python runs as it does on a GPU, against the schemas that bindings.cpp declares.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import torch
from cuda_host import COMPILER, ROOT
from torch import Tensor

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class PatchSizes(ctypes.Structure):
    """`mapet::PatchSizes` of csrc/permuted_embed.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("images", "ranks", "grid", "patch")]


class Pixels(ctypes.Structure):
    """`mapet::Pixels`."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("is_uint8", ctypes.c_bool),
        *((name, ctypes.c_longlong) for name in ("image", "channel", "y", "x")),
    ]


class BufferSizes(ctypes.Structure):
    """`mapet::BufferSizes`."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("images", "tokens", "ranks", "cut", "width")),
        *((name, ctypes.c_bool) for name in ("class_token", "mask_tokens", "query_stream")),
    ]


def compile_library(folder: Path) -> ctypes.CDLL:
    """The kernels as a shared library of emulated blocks."""
    path = folder / "cuda_embed.so"
    # Threads switch by longjmp, which fortified libraries take for an error.
    options = ["-O2", "-U_FORTIFY_SOURCE", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [COMPILER, *options, str(ROOT / "tests/cuda_embed_driver.cpp"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    library = ctypes.CDLL(str(path))
    for name in ("permuted_patches", "assemble", "position_gradient"):
        getattr(library, f"host_{name}").restype = ctypes.c_char_p  # what it has against the call
    return library


def schemas() -> dict[str, str]:
    """Declarations of the operators in bindings.cpp, by name."""
    calls = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", (ROOT / "csrc/bindings.cpp").read_text())
    whole = ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]
    return {text.split("(")[0]: text for text in whole}


class HostOperators:
    """The operators for CPU tensors; `descending`: the order in which threads and blocks take turns."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.descending = library, False
        self.calls: list[str] = []

    def register(self) -> torch.library.Library:
        """Declare them, where the built library has not, and give them these implementations; until it is destroyed."""
        fragment = torch.library.Library("mapet_kernels", "FRAGMENT")
        implementations = {
            "cuda_permuted_patches": self.permuted_patches,
            "cuda_assemble_streams": self.assemble_streams,
            "cuda_assemble_position_gradient": self.assemble_position_gradient,
        }
        for name, implementation in implementations.items():
            if not hasattr(torch.ops.mapet_kernels, name):
                fragment.define(schemas()[name])
            fragment.impl(name, implementation, "CPU")
        return fragment

    def permuted_patches(self, images, patches, out, mean, std, patch_size) -> None:
        """See bindings.cpp."""
        work = torch.promote_types(out.dtype, torch.float32)
        assert images.dtype in (torch.uint8, work) and all(x is None or x.dtype == work for x in (mean, std))
        sizes = PatchSizes(*patches.shape, images.shape[2] // patch_size, patch_size)
        pixels = Pixels(images.data_ptr(), images.dtype == torch.uint8, *images.stride())
        self._call("permuted_patches", sizes, out, ctypes.byref(pixels), patches, mean, std, out)

    def assemble_streams(
        self, content, pos_embed, mask_token, class_token, perm, out, cut, mask_tokens, query_stream
    ) -> None:
        """See bindings.cpp."""
        has_class = class_token is not None
        ranks = content.shape[1] + has_class
        sizes = BufferSizes(*perm.shape, ranks, cut, out.shape[1], has_class, mask_tokens, query_stream)
        self._call("assemble", sizes, out, content, pos_embed, mask_token, class_token, perm, out)

    def assemble_position_gradient(
        self, d_rows, rank_of, d_position, d_masked, ranks, cut, mask_tokens, query_stream
    ) -> None:
        """See bindings.cpp."""
        sizes = BufferSizes(*rank_of.shape, ranks, cut, d_rows.shape[1], False, mask_tokens, query_stream)
        self._call("position_gradient", sizes, d_rows, d_rows, rank_of, d_position, d_masked)

    def _call(self, name: str, sizes: ctypes.Structure, typed: Tensor, *arguments) -> None:
        self.calls.append(name)
        for x in arguments:
            assert not isinstance(x, Tensor) or x.is_contiguous()
        pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
        function = getattr(self.library, f"host_{name}")
        refusal = function(ctypes.byref(sizes), ELEMENTS[typed.dtype], *pointers, self.descending)
        assert refusal is None, refusal.decode()
