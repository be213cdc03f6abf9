"""Parts that go wrong, each in its own way: what tests/test_harvest.py gives the harvest to run."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time

from bench.harvesting.part import Run, Skipped

BYSTANDER = "import time; time.sleep(600)"


def well(run: Run) -> None:
    run.record("check", what="a toy", ok=True, error=float("inf"))


def raises(run: Run) -> None:
    run.record("check", what="before the end", ok=True)
    deep(30)


def deep(level: int) -> None:
    """By two calls in turn, as Python shortens a traceback that repeats one line."""
    if level == 0:
        raise RuntimeError("illegal memory access, " + "as it were, " * 50 + "told to its end")
    if level % 2:
        deep(level - 1)
    else:
        deep(level - 1)


def hangs(run: Run) -> None:
    """Deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run.record("child", pid=os.getpid())
    while True:
        time.sleep(60)


def slow(run: Run) -> None:
    """Would go on for ever, and can be interrupted."""
    time.sleep(600)


def kills_itself(run: Run) -> None:
    run.record("check", what="before the end", ok=True)
    os.kill(os.getpid(), signal.SIGKILL)


def segfaults(run: Run) -> None:
    ctypes.string_at(0)


def exits(run: Run) -> None:
    os._exit(7)


def takes_all_memory(run: Run) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
    kept = []
    while True:
        kept.append(bytearray(64 << 20))


def takes_all_of_the_gpu(run: Run) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def prints_garbage(run: Run) -> None:
    for _ in range(400):
        sys.stdout.buffer.write(os.urandom(1 << 14))
    sys.stdout.flush()
    run.records.write_bytes(b'\xff\xfe{"kind": "half a li\n')
    run.record("check", what="after the garbage", ok=True)


def leaves_children(run: Run) -> None:
    """One that is deaf to SIGINT and outlives its parent, unless the whole group is ended."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {BYSTANDER}"
    child = subprocess.Popen([sys.executable, "-c", code])
    run.record("child", pid=child.pid)


def hangs_with_children(run: Run) -> None:
    leaves_children(run)
    hangs(run)


def not_here(run: Run) -> None:
    raise Skipped("no such machine")
