"""The CUDA kernels' own source, compiled for the CPU and called through ctypes: a backend for tests without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mapet_kernels.two_stream_attention.problem import Problem, Streams

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++") or shutil.which("c++")
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class View(ctypes.Structure):
    """`mapet::View` of csrc/two_stream_attention.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_longlong) for name in ("image", "row", "head"))]


class Sizes(ctypes.Structure):
    """`mapet::Sizes`."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("images", "heads", "size", "tokens", "targets", "cut")),
        *((name, ctypes.c_bool) for name in ("mask_tokens", "with_content")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cuts", "perm")),
    ]


class Device(ctypes.Structure):
    """`mapet::Device`."""

    _fields_ = [(name, ctypes.c_int) for name in ("architecture", "processors", "shared_limit")]


class Plan(ctypes.Structure):
    """`mapet::Plan`."""

    _fields_ = [("resident", ctypes.c_bool)] + [
        (name, ctypes.c_int) for name in ("warps", "stages", "blocks_per_head", "shared")
    ]


def compile_library(folder: Path) -> ctypes.CDLL:
    """The kernels as a shared library of emulated blocks."""
    path = folder / "cuda_host.so"
    # Threads switch by longjmp, which fortified libraries take for an error.
    options = ["-O2", "-U_FORTIFY_SOURCE", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [COMPILER, *options, str(ROOT / "tests/cuda_host_driver.cpp"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    library = ctypes.CDLL(str(path))
    library.host_forward.restype = library.host_backward.restype = ctypes.c_char_p  # what it has against the call
    return library


def view(x: Tensor | None) -> View:
    """A tensor (B, rows, H, ...) as the kernels see it."""
    return View() if x is None else View(x.data_ptr(), *x.stride()[:3])


def views(*parts: Streams | Tensor) -> ctypes.Array:
    """Streams as two views each, tensors as one."""
    tensors = [x for part in parts for x in ((part.content, part.query) if isinstance(part, Streams) else (part,))]
    return (View * len(tensors))(*(view(x) for x in tensors))


@dataclass(frozen=True)
class HostBackend:
    """The interface of the other backends of two-stream attention, on emulated blocks of a device.

    descending: the order in which threads and blocks take turns.
    """

    library: ctypes.CDLL
    device: Device
    descending: bool = False

    def forward(
        self, q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem: Problem, perm=None
    ) -> None:
        """Fill `out` and `lse`, which start as NaN."""
        _poison(out, lse)
        refusal = self.library.host_forward(
            ctypes.byref(call_sizes(q, k, problem, perm)), TYPES[k.dtype], views(q, k, v, out, lse),
            ctypes.byref(self.device), self.descending,
        )  # fmt: skip
        assert refusal is None, refusal.decode()

    def backward(self, d_out, q, k, v, out, lse, dq, dk, dv, problem, perm=None) -> None:
        """Fill `dq`, `dk` and `dv`, which start as NaN."""
        _poison(dq, Streams(dk, dv))
        sizes = call_sizes(q, k, problem, perm)
        workspace = torch.full((2, sizes.images, sizes.heads, sizes.tokens + 2 * sizes.targets), torch.nan)
        refusal = self.library.host_backward(
            ctypes.byref(sizes), TYPES[k.dtype], views(q, k, v, out, lse, d_out, dq, dk, dv),
            ctypes.c_void_p(workspace.data_ptr()), ctypes.byref(self.device), self.descending,
        )  # fmt: skip
        assert refusal is None, refusal.decode()


def _poison(*streams: Streams) -> None:
    for tensor in (x for pair in streams for x in (pair.content, pair.query) if x is not None):
        tensor.fill_(torch.nan)


def call_sizes(q: Streams, k: Tensor, problem: Problem, perm: Tensor | None) -> Sizes:
    """`Sizes` of one call."""
    per_image = isinstance(problem.cut, Tensor)
    return Sizes(
        k.shape[0], k.shape[2], k.shape[3], problem.tokens, problem.targets, 0 if per_image else problem.cut,
        problem.mask_tokens, q.content is not None, problem.scale, problem.cut.data_ptr() if per_image else None,
        None if perm is None else perm.data_ptr(),
    )  # fmt: skip


def forward_call(
    library: ctypes.CDLL, device: Device, q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams,
    problem: Problem, perm: Tensor | None,
) -> tuple[ctypes.Array, Plan]:  # fmt: skip
    """The argument of a forward kernel in half precision, as bytes, and how it is to be launched."""
    sizes, plan = call_sizes(q, k, problem, perm), Plan()
    library.host_plan(ctypes.byref(sizes), TYPES[k.dtype], False, ctypes.byref(device), ctypes.byref(plan))
    argument = ctypes.create_string_buffer(1024)
    count = library.host_forward_call(
        ctypes.byref(sizes), TYPES[k.dtype], views(q, k, v, out, lse), ctypes.byref(device), argument, len(argument)
    )
    assert count > 0, "the argument has become larger than its buffer"
    return argument, plan
