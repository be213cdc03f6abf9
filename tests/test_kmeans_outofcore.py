"""kmeans.fit of more rows than the process may have memory for, and a fit that is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mapet_kernels import kmeans

SCRIPT = Path(__file__).parent / "kmeans_script.py"
SPARE_MIB, CHUNK = 48, 2 * 2**20


def command(job: dict, paths: list[Path]) -> list:
    return [sys.executable, SCRIPT, json.dumps(job), *map(str, paths)]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, whose RLIMIT_DATA counts all memory")
@pytest.mark.parametrize("in_memory", [False, True])
def test_more_rows_than_memory(tmp_path, in_memory):
    """96 MiB of rows in a process that may take 48 MiB: from files it fits, and reading them whole does not."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path in paths:
        np.save(path, rng.standard_normal((65_536, 256), np.float32).astype(np.float16))
    settings = {"clusters": 4, "redos": 1, "iterations": 2, "max_points_per_centroid": 40_000, "chunk_bytes": CHUNK}
    job = {"fits": [settings], "spare_mib": SPARE_MIB, "in_memory": in_memory, "report": str(tmp_path / "result")}
    assert sum(path.stat().st_size for path in paths) == 2 * SPARE_MIB * 2**20 + 3 * 128
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(job, paths), env=environment, capture_output=True, text=True, timeout=120)
    if in_memory:
        assert done.returncode != 0
        assert "can't allocate memory" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result0_0")
    assert result["rows"] == result["counts"].sum() == 160_000
    assert result["objectives"][0][1] < result["objectives"][0][0] < 2.2 * 160_000 * 256


def test_kill_9_in_mid_fit_and_on_to_the_same_result(tmp_path):
    x = torch.randn(3000, 12, generator=torch.Generator().manual_seed(0))
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path, part in zip(paths, x.split(2000), strict=True):
        np.save(path, part.numpy())
    settings = {"clusters": 30, "redos": 3, "iterations": 4, "chunk_bytes": 20_000}
    state = tmp_path / "state"
    job = {"fits": [{**settings, "checkpoint": str(state)}], "slow": 0.2}
    process = subprocess.Popen(command(job, paths), stdout=subprocess.PIPE, text=True)
    try:
        done = [process.stdout.readline().strip() for _ in range(6)]
        assert done == ["0 0", "0 1", "0 2", "0 3", "1 0", "1 1"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    rest = []
    resumed = kmeans.fit(paths, **settings, checkpoint=state, on_iteration=rest.append)
    assert 1 <= len(rest) <= 6
    uninterrupted = kmeans.fit(paths, **settings)
    assert torch.equal(resumed.centroids, uninterrupted.centroids)
    assert torch.equal(resumed.counts, uninterrupted.counts)
    assert resumed.objectives == uninterrupted.objectives
    assert resumed.redo == uninterrupted.redo
