"""Elastic restart: torchrun starts killed processes again, which go on from the last checkpoint to the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_run import latest, make_cache, make_config

from mapet.distributed import store_of_attempt
from mapet.errors import MapetError
from mapet.training.checkpoint import CheckpointStore
from mapet.training.loop import pretrain

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "elastic_rank.py"
CHANGES = {"train.ema_decay": 0.9, "optim.eps": 1e-3, "train.max_steps": 8, "train.save_every": 2}
PATIENCE = timedelta(seconds=20)


def torchrun(output: Path, kills: str, cache: Path, **changes: object) -> subprocess.CompletedProcess:
    """Two processes, started again up to twice."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, "--max-restarts", "2", "--monitor-interval", "0.2", SCRIPT, output.parent, kills, cache, output,
         json.dumps(CHANGES | changes)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_processes_go_on_from_the_last_whole_checkpoint(tmp_path: Path, parallel: str) -> None:
    """Rank 1 is killed in step 3, between checkpoints; then the main process while it saves after step 6."""
    cache = make_cache(tmp_path / "cache")
    done = torchrun(tmp_path / "two", "0:1:3:step,1:0:6:save", cache, **{"train.parallel": parallel})
    assert done.returncode == 0, done.stderr
    attempts = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert sorted((a["attempt"], a["rank"], a["start"]) for a in attempts) == [
        (0, 0, 0), (0, 1, 0), (1, 0, 2), (1, 1, 2), (2, 0, 4), (2, 1, 4),
    ]  # fmt: skip
    assert len({a["pid"] for a in attempts}) == 6
    pretrain(make_config(cache, tmp_path / "one", **CHANGES))
    one, two = (latest(CheckpointStore(tmp_path / name / "checkpoints")) for name in ("one", "two"))
    assert one.step == two.step == 8
    for ours, theirs in ((two.state.task, one.state.task), (two.state.ema, one.state.ema)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def together(store: dist.TCPStore, size: int) -> list[dist.Store]:
    """The stores that processes of one attempt get."""
    found: list[dist.Store | None] = [None] * size

    def start(rank: int) -> None:
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=PATIENCE)
        found[rank] = store_of_attempt(client, rank, size)

    threads = [threading.Thread(target=start, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_attempts_share_a_store_with_nothing_of_earlier_ones() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    for attempt in range(3):
        first, second, third = together(server, 3)
        assert not second.check(["address"]), "of an earlier attempt"
        first.set("address", str(attempt))
        assert third.get("address") == second.get("address") == str(attempt).encode()
    server.set("mapet/asks/1", "asked by one that is dead")
    first, second = together(server, 2)
    first.set("address", "new")
    assert second.get("address") == b"new"


def test_a_process_that_never_comes_is_named() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=0.3))
    with pytest.raises(MapetError, match=r"processes \[1, 2\] of 3 did not start within"):
        store_of_attempt(server, 0, 3)
