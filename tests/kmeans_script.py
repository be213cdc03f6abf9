"""k-means fits of .npy files as a process of its own: kmeans_script.py JSON FILE...

The JSON has `fits`, a list of settings of `kmeans.fit`, and may have `report`, where the results go (number of fit and
of rank are appended), `slow`, seconds to sleep after each iteration, `break_rank`, whose rows get a NaN before the last
fit, `in_memory`, to read the files whole, and `spare_mib`: the process may then take so much more memory, and no more.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

if "RANK" not in os.environ:
    # mapet_kernels needs torch only; torch.distributed itself needs numpy.
    sys.modules["numpy"] = sys.modules["sklearn"] = None

import torch
import torch.distributed as dist

from mapet_kernels import kmeans


def memory_taken() -> int:
    """Bytes of this process's own writable memory, which is what RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))


def main(job: dict, paths: list[str]) -> None:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        dist.init_process_group("gloo")
    # What the libraries keep for themselves is taken before the limit is set.
    kmeans.KMeans(2, random_state=0).fit(torch.eye(2).repeat(50, 1))
    if "spare_mib" in job:
        limit = memory_taken() + job["spare_mib"] * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    source = kmeans.NpyRows(paths)
    if job.get("in_memory"):
        source = kmeans.TensorRows(source.read(0, source.shape[0]))
    source = kmeans.share_of_rows(source, rank, size)

    def tell(done: kmeans.Iteration) -> None:
        print(done.redo, done.iteration, flush=True)
        time.sleep(job.get("slow", 0))

    for number, settings in enumerate(job["fits"]):
        if job.get("break_rank") == rank and settings is job["fits"][-1]:
            source = kmeans.TensorRows(source.read(0, source.shape[0]))
            source.values[3, 0] = float("nan")
        result = kmeans.fit(source, **settings, on_iteration=tell)
        if "report" in job:
            torch.save(vars(result), f"{job['report']}{number}_{rank}")


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]), sys.argv[2:])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # else its threads may abort the process as Python ends
