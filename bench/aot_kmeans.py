"""python -m bench aot-kmeans: compile the k-means kernels for GPUs that are not here, and tell what came of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import records
from bench.aot import DTYPES, ptxas_report, source
from mapet_kernels import launch
from mapet_kernels.kmeans_assign import triton_backend as assign
from mapet_kernels.kmeans_assign.passes import is_direct
from mapet_kernels.kmeans_update import triton_backend as update
from mapet_kernels.triton_launch import Launch

PROCESSORS = {80: 108, 90: 132}
"""Of an A100 and an H200."""


@dataclass(frozen=True)
class KMeansAotReport:
    """What to compile: every combination of these, for `rows` rows."""

    features: tuple[int, ...] = (64, 512, 4096)
    clusters: int = 8192
    rows: int = 65536
    dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32")
    architectures: tuple[int, ...] = (80, 90)
    record: bool = True

    def run(self) -> None:
        """Compile, print, and keep a record if wanted."""
        results = run(self)
        if self.record:
            print(f"record: {records.write('aot', 'kmeans', results)}")


@dataclass(frozen=True)
class CompiledKMeans:
    """One kernel on one architecture. Spills and shared memory in bytes; `mma` counts tensor-core instructions."""

    kernel: str
    mode: str
    features: int
    dtype: str
    architecture: int
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    mma: int
    asynchronous_copies: int


def run(options: KMeansAotReport) -> dict[str, Any]:
    """Compile all, print a table line each, and return the record's results."""
    rows = []
    for row in compile_all(options):
        rows.append(asdict(row))
        print(
            f"{row.kernel:18} {row.mode:6} D {row.features:4} {row.dtype} sm_{row.architecture} warps {row.warps} "
            f"stages {row.stages} registers {row.registers:3} spills {row.spill_stores:4}/{row.spill_loads:4} shared "
            f"{row.shared / 1024:5.1f} KiB mma {row.mma:3} async {row.asynchronous_copies:3}",
            flush=True,
        )
    return {"triton": triton.__version__, "clusters": options.clusters, "rows": options.rows, "kernels": rows}


def compile_all(options: KMeansAotReport) -> Iterator[CompiledKMeans]:
    """Compile every kernel of kmeans_assign and kmeans_update for each combination."""
    for features in options.features:
        for name in options.dtypes:
            for architecture in options.architectures:
                for exact in (True, False):
                    for part in launches(options, features, DTYPES[name], architecture, exact):
                        yield compile_launch(part, "exact" if exact else "fast", features, name, architecture)


def launches(
    options: KMeansAotReport, features: int, dtype: torch.dtype, architecture: int, exact: bool
) -> list[Launch]:
    """The launches of one call, on CPU tensors that are never read."""
    x = torch.empty(1, options.rows, features, dtype=dtype)
    centroids = torch.empty(1, options.clusters, features)
    config = launch.kmeans_assign_scores(features, exact, launch.TARGETS[architecture])
    direct = is_direct(x, exact, config)
    centroids_part, prepared = assign.centroids_launch(centroids, dtype, direct, config)
    rows_part, rows = assign.rows_launch(x, prepared, direct, exact, config)
    scores_part, found = assign.scores_launch(rows, prepared, options.rows, exact, config, PROCESSORS[architecture])
    merge_part, nearest, status = assign.merge_launch(found, config)
    parts = [centroids_part, rows_part, scores_part, merge_part]
    if exact:
        parts += [
            assign.decide_launch(x, centroids, nearest, status, found, nearest, config),
            assign.distances_launch(x, centroids, nearest)[0],
            *update_launches(x[0], options.clusters),
        ]
    return [part for part in parts if part is not None]


def update_launches(x: torch.Tensor, clusters: int) -> tuple[Launch, ...]:
    """The launches of one call of kmeans_update that adds to what is there."""
    order, first = torch.empty(len(x), dtype=torch.int64), torch.empty(clusters + 1, dtype=torch.int64)
    sums = torch.empty(clusters, x.shape[1])
    return update.sums_launches(x, order, order.to(torch.int32), first, sums, add=True)


def compile_launch(part: Launch, mode: str, features: int, dtype: str, architecture: int) -> CompiledKMeans:
    """Compile one launch and read what ptxas reports."""
    options = {name: part.constants[name] for name in ("num_warps", "num_stages") if name in part.constants}
    compiled = triton.compile(source(part), target=GPUTarget("cuda", architecture, 32), options=options)
    report = ptxas_report(compiled.asm["ptx"], architecture)
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups())
    return CompiledKMeans(
        kernel=part.kernel.__name__,
        mode=mode,
        features=features,
        dtype=dtype,
        architecture=architecture,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spill_stores=stores,
        spill_loads=loads,
        shared=compiled.metadata.shared,
        mma=len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", compiled.asm["ptx"])),
        asynchronous_copies=len(re.findall(r"\bcp\.async\.(?:bulk\.tensor|cg|ca)", compiled.asm["ptx"])),
    )
