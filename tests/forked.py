"""Run something in forked processes: as the ranks of a run, or to be killed at a point of their own choosing."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

FORK = multiprocessing.get_context("fork")


def run_ranks(task: Callable[[int], object], size: int = 2, timeout: float = 60.0) -> list[int]:
    """Run `task(rank)` in processes that see the environment of torchrun; their exit codes, 1 for an exception."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # the threads of the parent's pool are not in the fork
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        os.environ.update({**where, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        code = task(rank)
        os._exit(code if isinstance(code, int) else 0)

    processes = [FORK.Process(target=run, args=(rank,)) for rank in range(size)]
    return _join(processes, timeout)


def killed_at_sync(task: Callable[[], object], sync: int, timeout: float = 60.0) -> bool:
    """Run `task` and SIGKILL it when the `sync`-th file or folder is about to be flushed; False if it ended first."""

    def run() -> None:
        torch.set_num_threads(1)
        flush, calls = os.fsync, 0

        def flush_or_die(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == sync:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = flush_or_die
        task()
        os._exit(0)

    (code,) = _join([FORK.Process(target=run)], timeout)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def kill_after(
    task: Callable[[], object], happened: Callable[[], bool], rng: random.Random, timeout: float = 60.0
) -> None:
    """Run `task` and kill it and its children with SIGKILL, at most 20 ms after `happened` becomes true."""

    def run() -> None:
        os.setsid()
        torch.set_num_threads(1)
        task()

    process = FORK.Process(target=run)
    process.start()
    deadline = time.monotonic() + timeout
    while not happened():
        assert process.is_alive() and time.monotonic() < deadline, "it ended before what should have happened"
    time.sleep(0.02 * rng.random())
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _join(processes: list, timeout: float) -> list[int]:
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def in_fork(task: Callable[[], object]) -> object:
    """What `task` returns in a process of its own, or name, text and exit code of the error that it raises."""
    ours, theirs = FORK.Pipe(duplex=False)

    def call() -> None:
        torch.set_num_threads(1)
        try:
            theirs.send(task())
        except BaseException as error:
            theirs.send((type(error).__name__, str(error), getattr(error, "exit_code", None)))
        os._exit(0)

    process = FORK.Process(target=call)
    process.start()
    answer = ours.recv()
    process.join()
    return answer


def waiting(task: Callable[[], object], ready: Path) -> multiprocessing.Process:
    """A process that runs `task`, when that has made the file `ready`."""
    process = FORK.Process(target=task)
    process.start()
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    return process
