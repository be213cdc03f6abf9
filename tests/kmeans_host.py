"""The CUDA k-means kernel's own source, compiled for the CPU and called through ctypes: for tests without a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_host import COMPILER, ROOT
from torch import Tensor

from mapet_kernels.kmeans_assign import candidates
from mapet_kernels.kmeans_assign.bound import Centroids, Rows
from mapet_kernels.kmeans_assign.candidates import Lists


class AssignSizes(ctypes.Structure):
    """`mapet::AssignSizes` of csrc/kmeans_assign.h."""

    _fields_ = [("groups", ctypes.c_int), ("rows", ctypes.c_longlong)] + [
        (name, ctypes.c_int) for name in ("clusters", "features", "shares")
    ]


class AssignRows(ctypes.Structure):
    """`mapet::AssignRows`."""

    _fields_ = [("values", ctypes.c_void_p), ("stride", ctypes.c_longlong)] + [
        (name, ctypes.c_void_p) for name in ("scale", "radius")
    ]


class AssignCentroids(ctypes.Structure):
    """`mapet::AssignCentroids`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "bias", "slope", "slack")]


class AssignLists(ctypes.Structure):
    """`mapet::AssignLists`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("bounds", "ids", "reach")]


def compile_library(folder: Path) -> ctypes.CDLL:
    """The kernel as a shared library of emulated blocks."""
    path = folder / "kmeans_host.so"
    # Threads switch by longjmp, which fortified libraries take for an error.
    options = ["-O2", "-U_FORTIFY_SOURCE", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [COMPILER, *options, str(ROOT / "tests/kmeans_host_driver.cpp"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    library = ctypes.CDLL(str(path))
    if hasattr(library, "host_assign_scores"):  # not without _Float16
        library.host_assign_scores.restype = ctypes.c_char_p  # what it has against the call
    return library


def pointer(x: Tensor | None) -> int | None:
    """Where a tensor lies."""
    return None if x is None else x.data_ptr()


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


def launch_arguments(library: ctypes.CDLL, *call) -> ctypes.Array:
    """The kernel's argument, as bytes, for the arguments of `structures`."""
    argument = ctypes.create_string_buffer(1024)
    parts = map(ctypes.byref, structures(*call))
    assert library.host_assign_call(*parts, argument, len(argument)) > 0, "it has become larger than its buffer"
    return argument


@dataclass(frozen=True)
class HostBackend:
    """The interface of the other backends of kmeans_assign, on emulated blocks of an architecture.

    descending: the order in which threads and blocks take turns. coarse: the worst tensor cores the bound allows.
    """

    library: ctypes.CDLL
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
        refusal = self.library.host_assign_scores(sizes, *parts[:2], lists.reach is not None, parts[2], *order)
        assert refusal is None, refusal.decode()
        assert not lists.bounds.isnan().any() and (lists.ids >= -1).all(), "a slot was not written"
        assert lists.reach is None or not lists.reach.isnan().any(), "a reach was not written"
