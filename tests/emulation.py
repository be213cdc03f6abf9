"""The CUDA kernels' own source on CPU tensors: compiled for the CPU, where a block's threads run one by one.

csrc/host_emulation.h runs the threads from barrier to barrier, so that index maps, tile schedules and the online
softmax are tested as a GPU gets them. `EMULATED[op]()` is a context in which backend "cuda" of an op takes CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from filelock import FileLock
from op_checks import poisoned
from torch import Tensor

from mapet_kernels.kmeans_assign import candidates
from mapet_kernels.kmeans_assign import op as assign_op
from mapet_kernels.kmeans_assign.bound import Centroids, Rows
from mapet_kernels.kmeans_assign.candidates import Lists
from mapet_kernels.permuted_embed import op as embed_op
from mapet_kernels.two_stream_attention import op as attention_op
from mapet_kernels.two_stream_attention.problem import Problem, Streams

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
BUILT = ROOT / "build" / "tests"
COMPILER = shutil.which("g++") or shutil.which("c++")
# Threads switch by longjmp, which fortified libraries take for an error.
FLAGS = ("-U_FORTIFY_SOURCE", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC")
DTYPES = {
    "two_stream_attention": (torch.float32, torch.float16),
    "permuted_embed": (torch.float32, torch.float16, torch.float64),
    "kmeans_assign": (torch.float32, torch.float16, torch.bfloat16),
}
"""What the emulated kernels of an op are tried in."""


def built(name: str, make: Callable[[Path], None], *more: object) -> Path:
    """What `make` writes of csrc/ and tests/*.cpp: once for all processes, and anew when a source or `more` changes."""
    digest = hashlib.sha256(repr((COMPILER, FLAGS, torch.__version__, *more)).encode())
    for source in sorted([*CSRC.iterdir(), *Path(__file__).parent.glob("*.cpp")]):
        digest.update(source.read_bytes())
    path = BUILT / f"{digest.hexdigest()[:16]}_{name}"
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(partial := path.with_name(f"{path.name}.part"))
            partial.replace(path)
    return path


def compiled(*command: object) -> None:
    """Run a compiler."""
    done = subprocess.run([COMPILER, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@functools.cache
def has_half() -> bool:
    """Whether there is a C++ compiler, with half precision."""
    if COMPILER is None:
        return False
    command = [COMPILER, "-x", "c++", "-dM", "-E", "-"]
    return "__FLT16_MAX__" in subprocess.run(command, input="", capture_output=True, text=True, check=False).stdout


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """tests/NAME_driver.cpp; the test is skipped where there is no compiler with half precision."""
    if not has_half():
        pytest.skip("needs a C++ compiler with _Float16")
    driver = Path(__file__).with_name(f"{name}_driver.cpp")
    found = ctypes.CDLL(str(built(f"{name}.so", lambda path: compiled("-O2", *FLAGS, "-shared", driver, "-o", path))))
    for function in re.findall(r"const char\* (host_\w+)\(", driver.read_text()):
        getattr(found, function).restype = ctypes.c_char_p  # what it has against the call
    return found


def structure(name: str, *fields: str) -> type[ctypes.Structure]:
    """`mapet::NAME` of csrc/, its members as "type name name" for each type in turn."""
    kinds = {
        "int": ctypes.c_int, "bool": ctypes.c_bool, "float": ctypes.c_float, "long": ctypes.c_longlong,
        "pointer": ctypes.c_void_p,
    }  # fmt: skip
    members = [(member, kinds[line.split()[0]]) for line in fields for member in line.split()[1:]]
    return type(name, (ctypes.Structure,), {"_fields_": members})


View = structure("View", "pointer data", "long image row head")
Sizes = structure(
    "Sizes", "int images heads size tokens targets cut", "bool mask_tokens with_content", "float scale",
    "pointer cuts perm",
)  # fmt: skip
Device = structure("Device", "int architecture processors shared_limit")
Plan = structure("Plan", "bool resident", "int warps stages blocks_per_head shared")
PatchSizes = structure("PatchSizes", "int images ranks grid patch")
Pixels = structure("Pixels", "pointer data", "bool is_uint8", "long image channel y x")
BufferSizes = structure("BufferSizes", "int images tokens ranks cut width", "bool class_token mask_tokens query_stream")
AssignSizes = structure("AssignSizes", "int groups", "long rows", "int clusters features shares")
AssignRows = structure("AssignRows", "pointer values", "long stride", "pointer scale radius")
AssignCentroids = structure("AssignCentroids", "pointer values bias slope slack")
AssignLists = structure("AssignLists", "pointer bounds ids reach")

PLENTY = 1 << 20  # bytes: float32, which only the host has, needs more shared memory than a GPU's
RESIDENT, STREAMED, AHEAD = Device(70, 1, PLENTY), Device(70, 1000, PLENTY), Device(80, 1000, PLENTY)
"""Keys and values stay in shared memory, are streamed in one stage, or in two."""
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def pointer(x: Tensor | None) -> int | None:
    """Where a tensor lies."""
    return None if x is None else x.data_ptr()


def accepted(refusal: bytes | None) -> None:
    """What a launcher has against a call is an error."""
    assert refusal is None, refusal.decode()


def views(*parts: Streams | Tensor) -> ctypes.Array:
    """Tensors (B, rows, H, ...) as the kernels see them, streams as two."""
    given = [x for part in parts for x in ((part.content, part.query) if isinstance(part, Streams) else (part,))]
    return (View * len(given))(*(View() if x is None else View(x.data_ptr(), *x.stride()[:3]) for x in given))


@dataclass(frozen=True)
class AttentionHost:
    """The interface of the other backends of two-stream attention, on emulated blocks of a device.

    descending: the order in which threads and blocks take turns. fill: what results and workspace hold before.
    """

    device: Device = RESIDENT
    descending: bool = False
    fill: float = torch.nan

    def forward(self, q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem, perm=None) -> None:
        """Fill `out` and `lse`."""
        self.run("host_forward", call_sizes(q, k, problem, perm), k.dtype, (q, k, v), (out, lse))

    def backward(self, d_out, q, k, v, out, lse, dq, dk, dv, problem, perm=None) -> None:
        """Fill `dq`, `dk` and `dv`."""
        sizes = call_sizes(q, k, problem, perm)
        workspace = torch.full((4, sizes.images, sizes.heads, sizes.tokens + 2 * sizes.targets), torch.nan)
        workspace[1:3] = self.fill
        at = ctypes.c_void_p(workspace[1].data_ptr())
        self.run("host_backward", sizes, k.dtype, (q, k, v, out, lse, d_out), (dq, dk, dv), at)
        assert workspace[[0, 3]].isnan().all(), "written beyond the workspace"

    def run(self, name: str, sizes: Sizes, dtype: torch.dtype, given: tuple, filled: tuple, *more) -> None:
        """A function of the driver."""
        for x in filled:
            for tensor in (x.content, x.query) if isinstance(x, Streams) else (x,):
                if tensor is not None:
                    tensor.fill_(self.fill)
        options = *more, ctypes.byref(self.device), self.descending
        function = getattr(library("attention"), name)
        accepted(function(ctypes.byref(sizes), TYPES[dtype], views(*given, *filled), *options))


def call_sizes(q: Streams, k: Tensor, problem: Problem, perm: Tensor | None) -> Sizes:
    """`Sizes` of one call."""
    per_image = isinstance(problem.cut, Tensor)
    return Sizes(
        k.shape[0], k.shape[2], k.shape[3], problem.tokens, problem.targets, 0 if per_image else problem.cut,
        problem.mask_tokens, q.content is not None, problem.scale, problem.cut.data_ptr() if per_image else None,
        pointer(perm),
    )  # fmt: skip


def forward_call(device: Device, q: Streams, k, v, out, lse, problem, perm) -> tuple[ctypes.Array, Plan]:
    """The argument of a forward kernel in half precision, as bytes, and how it is to be launched."""
    sizes, plan, found = ctypes.byref(call_sizes(q, k, problem, perm)), Plan(), library("attention")
    found.host_plan(sizes, TYPES[k.dtype], False, ctypes.byref(device), ctypes.byref(plan))
    argument = ctypes.create_string_buffer(1024)
    options = ctypes.byref(device), argument, len(argument)
    count = found.host_forward_call(sizes, TYPES[k.dtype], views(q, k, v, out, lse), *options)
    assert count > 0, "the argument has become larger than its buffer"
    return argument, plan


@dataclass
class EmbedHost:
    """The operators of csrc/bindings.cpp that embed, for CPU tensors, under the schemas that are declared there.

    So the backend's Python runs as it does on a GPU. descending: the order in which threads and blocks take turns.
    """

    descending: bool = False

    def __post_init__(self) -> None:
        self.calls: list[str] = []

    def register(self) -> torch.library.Library:
        """Declare them, where the built library has not, and give them these implementations; until it is destroyed."""
        texts = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", (CSRC / "bindings.cpp").read_text())
        schemas = {(text := "".join(re.findall(r'"([^"]*)"', call))).split("(")[0]: text for call in texts}
        fragment = torch.library.Library("mapet_kernels", "FRAGMENT")
        for name in ("permuted_patches", "assemble_streams", "assemble_position_gradient"):
            if not hasattr(torch.ops.mapet_kernels, f"cuda_{name}"):
                fragment.define(schemas[f"cuda_{name}"])
            fragment.impl(f"cuda_{name}", getattr(self, name), "CPU")
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
        assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
        pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
        function = getattr(library("embed"), f"host_{name}")
        accepted(function(ctypes.byref(sizes), TYPES[typed.dtype], *pointers, self.descending))


@dataclass(frozen=True)
class AssignHost:
    """The interface of the other backends of kmeans_assign, on emulated blocks of an architecture.

    descending: the order in which threads and blocks take turns. coarse: the worst tensor cores the bound allows.
    """

    architecture: int = 70
    descending: bool = False
    coarse: bool = False

    def kmeans_assign(self, x: Tensor, centroids: Tensor, exact: bool, return_distance: bool) -> tuple:
        """As `cuda_backend.kmeans_assign`."""
        return candidates.kmeans_assign(x, centroids, exact, return_distance, self.scores)

    def scores(self, rows: Rows, centroids: Centroids, groups: int, n: int, shares: int, lists: Lists) -> None:
        """Fill the lists, all of whose elements must be written."""
        assert rows.values.dtype == centroids.values.dtype == torch.float16
        poison(lists)
        sizes, *parts = map(ctypes.byref, structures(rows, centroids, groups, n, shares, lists))
        order = self.architecture, self.descending, self.coarse
        accepted(library("kmeans").host_assign_scores(sizes, *parts[:2], lists.reach is not None, parts[2], *order))
        assert not lists.bounds.isnan().any() and (lists.ids >= -1).all(), "a slot was not written"
        assert lists.reach is None or not lists.reach.isnan().any(), "a reach was not written"


def structures(
    rows: Rows, centroids: Centroids, groups: int, n: int, shares: int, lists: Lists
) -> tuple[ctypes.Structure, ...]:
    """Sizes, rows, centroids and lists as the launcher takes them."""
    clusters, features = len(centroids.values) // groups, centroids.values.shape[1]
    return (
        AssignSizes(groups, n, clusters, features, shares),
        AssignRows(pointer(rows.values), rows.values.stride(0), pointer(rows.scale), pointer(rows.radius)),
        AssignCentroids(*map(pointer, (centroids.values, centroids.bias, centroids.slope, centroids.slack))),
        AssignLists(*map(pointer, (lists.bounds, lists.ids, lists.reach))),
    )


def poison(lists: Lists) -> None:
    """NaN, and ids that do not exist."""
    lists.bounds.fill_(torch.nan)
    lists.ids.fill_(-7)
    if lists.reach is not None:
        lists.reach.fill_(torch.nan)


def launch_arguments(*call) -> ctypes.Array:
    """The assignment kernel's argument, as bytes, for the arguments of `structures`."""
    argument = ctypes.create_string_buffer(1024)
    parts = map(ctypes.byref, structures(*call))
    assert library("kmeans").host_assign_call(*parts, argument, len(argument)) > 0, "larger than its buffer"
    return argument


@contextmanager
def _emulated(op: ModuleType, choice: str, host: object) -> Iterator[SimpleNamespace]:
    """In place of the op's backend "cuda" the host, which "auto" takes too. `.host` may be changed inside."""
    chosen, backend, use = getattr(op, choice), getattr(op, "_backend", None), SimpleNamespace(host=host)

    def choose(requested: str, *others, **more) -> str:
        return "cuda" if requested in ("auto", "cuda") else chosen(requested, *others, **more)

    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(op, choice, choose)
        if isinstance(host, EmbedHost):
            patch.setitem(sys.modules, "mapet_kernels._C", ModuleType("mapet_kernels._C"))
        else:
            patch.setattr(op, "_backend", lambda name: use.host if name == "cuda" else backend(name))
        yield use


@contextmanager
def emulated_embed(**options) -> Iterator[SimpleNamespace]:
    """Inside, the operators of the embedding take CPU tensors."""
    library("embed")
    host = EmbedHost(**options)
    fragment = host.register()
    try:
        with _emulated(embed_op, "choose_listed_backend", host) as use:
            yield use
    finally:
        fragment._destroy()


def emulated_attention(*options) -> object:
    """Inside, two-stream attention takes the emulated kernels."""
    library("attention")
    return _emulated(attention_op, "choose_backend", AttentionHost(*options))


def emulated_assign(*options) -> object:
    """Inside, kmeans_assign takes the emulated kernel."""
    library("kmeans")
    return _emulated(assign_op, "choose_listed_backend", AssignHost(*options))


EMULATED: dict[str, Callable] = {
    "two_stream_attention": emulated_attention,
    "permuted_embed": emulated_embed,
    "kmeans_assign": emulated_assign,
}
"""Ops that have CUDA C++ kernels."""
