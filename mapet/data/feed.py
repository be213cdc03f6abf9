"""Batches from data workers that may die, stall or starve.

A thread takes the batches from torch's DataLoader, so that the process that waits for one goes on hearing signals, and
finds out what has become of the worker whose turn it is. Every worker counts up its own number while it works; one that
stands still for `patience` seconds, though its batch is waited for, is stalled, however long a batch takes otherwise.
"""

from __future__ import annotations

import multiprocessing
import queue
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from ctypes import c_uint64
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mapet.checked import environment_number
from mapet.distributed import STOP_SIGNALS, process_facts
from mapet.errors import ConfigError, DataError, MapetError

T = TypeVar("T")
PATIENCE = 20.0
"""Seconds."""
START_UP = 6
"""A worker that has yet to begin, and may be importing, has so many times the patience."""
POLL_SECONDS = 0.2
TAKE_SECONDS = 1
"""The thread, which may be waiting for a batch, looks so often whether it is still wanted."""
AHEAD = 2
"""Batches that a worker makes ahead; torch's own number."""
HELD = 2
"""Batches in shared memory besides: one that is handed over, one in use."""
SHARED_MEMORY = Path("/dev/shm")
TOO_MANY_FILES = re.compile("too many open files", re.I)


class WorkerFailure(DataError):
    """A data worker that died, stalled, or could not hand its batch over."""


class FeedStopped(Exception):
    """No batch was there when the process was asked to stop."""


class Pulse:
    """A number for each worker, which it counts up while it works."""

    def __init__(self, workers: int) -> None:
        # Not a tensor, whose shared memory may be what there is too little of.
        self.counts = multiprocessing.RawArray(c_uint64, max(workers, 1))

    def beat(self) -> None:
        """This worker has done something."""
        info = get_worker_info()
        self.counts[info.id if info else 0] += 1


class WorkerData(Dataset, Generic[T]):
    """What a worker makes of a key; an expected failure travels to the process as it is."""

    def __init__(self, make: Callable[[Any, Callable[[], None]], T], pulse: Pulse) -> None:
        self.make, self.pulse = make, pulse

    def __getitem__(self, key: Any) -> T | MapetError:
        self.pulse.beat()
        try:
            return self.make(key, self.pulse.beat)
        except MapetError as error:
            return error
        finally:
            self.pulse.beat()


@dataclass(frozen=True)
class _Raised:
    """What ended the thread; None for the end of the data."""

    error: BaseException | None


class Feed(Generic[T]):
    """The batches `make(key, beat)` of keys, in their order; a context manager, which ends the workers in any case.

    Args:
        make: makes one batch, calling `beat` now and then; picklable where workers are spawned.
        keys: what the batches are made of; its length is known. No tensors: they would travel in shared memory.
        workers: processes; 0 for none but this one.
        batch_bytes: of a batch in shared memory, about.
        patience: seconds without progress after which a worker counts as stalled.
        stopped: asked while no batch is there; FeedStopped where it says yes.
        fork: whether workers are forked whatever the system's habit is.
        prefix: of the options `workers` and `patience` that the person changes.
    Raises:
        ConfigError: free shared memory is less than the batches need.
        WorkerFailure: from `next`; the text says which worker, what happened and what to do.
        MapetError: from `next`, as `make` raised it.
    """

    def __init__(
        self,
        make: Callable[[Any, Callable[[], None]], T],
        keys: Collection[Any],
        *,
        workers: int,
        batch_bytes: int,
        patience: float = PATIENCE,
        stopped: Callable[[], bool] = lambda: False,
        pin_memory: bool = False,
        fork: bool = False,
        prefix: str = "",
    ) -> None:
        check_shared_memory(workers, batch_bytes, prefix=prefix)
        self.workers, self.patience, self.stopped, self.prefix = workers, patience, stopped, prefix
        self.batch_bytes, self.keys = batch_bytes, keys
        self.pulse = Pulse(workers)
        loader = DataLoader(
            WorkerData(make, self.pulse),
            sampler=keys,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            timeout=TAKE_SECONDS if workers else 0,
            pin_memory=pin_memory,
            multiprocessing_context="fork" if fork and workers else None,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator().manual_seed(0),  # without one, it draws from the global random state
        )
        self._ready: queue.Queue = queue.Queue(maxsize=1)
        self._taken, self._closed = 0, False
        self._processes = self._start(loader)
        # Not before the workers are forked.
        self._thread = threading.Thread(target=self._take, name="batches", daemon=True)
        self._thread.start()

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        waiting = time.monotonic()
        turn, seen = self._turn()
        while True:
            try:
                got = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self.stopped():
                    raise FeedStopped from None
                now = self._turn()
                if now != (turn, seen):
                    (turn, seen), waiting = now, time.monotonic()
                self._check(turn, time.monotonic() - waiting, begun=seen > 0)
                continue
            if not isinstance(got, _Raised):
                return got
            self._ready.put(got)  # for whoever asks once more
            if got.error is None:
                raise StopIteration
            if isinstance(got.error, MapetError):
                raise got.error
            # It may be that of a connection to a worker whose end the system has yet to tell.
            ended = connection.wait([process.sentinel for process in self._processes], timeout=5 * TAKE_SECONDS)
            for process in self._processes:
                if process.sentinel in ended:
                    process.join()
            self._check_alive()
            if TOO_MANY_FILES.search(str(got.error)):
                raise WorkerFailure(
                    "batches cannot be handed over: too many files are open; raise the limit (ulimit -n), or take "
                    f"fewer {self.prefix}workers"
                ) from got.error
            raise got.error

    def close(self) -> None:
        """End the workers, whatever they are doing; what they have made is lost."""
        self._closed = True
        self._at_exit.cancel()
        kill(self._processes)
        # A thread within torch while the interpreter ends would abort the process.
        self._thread.join(timeout=3 * TAKE_SECONDS)

    def _start(self, loader: DataLoader) -> list[BaseProcess]:
        """Start the workers: in this thread, where torch makes a signal handler that would raise anywhere, also in the
        middle of an update; it is taken out again."""
        before, main = set(multiprocessing.active_children()), threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD) if main and hasattr(signal, "SIGCHLD") else None
        try:
            self._batches = iter(loader)
        finally:
            if handler is not None:
                signal.signal(signal.SIGCHLD, handler)
            started = [process for process in multiprocessing.active_children() if process not in before]
            # Else multiprocessing would wait, at the end of the program, for workers that ignore its SIGTERM.
            self._at_exit = Finalize(None, kill, [started], exitpriority=0)
        return sorted(started, key=lambda process: int(re.findall(r"\d+", process.name)[-1]))  # numbered as started

    def _take(self) -> None:
        """The thread: batches into the queue, one ahead of the process."""
        while not self._closed:
            try:
                batch = next(self._batches)
            except StopIteration:
                return self._put(_Raised(None))
            except BaseException as error:
                if str(error).startswith("DataLoader timed out"):
                    continue
                return self._put(_Raised(error))
            if isinstance(batch, MapetError):
                return self._put(_Raised(batch))
            self._put(batch)
            self._taken += 1

    def _put(self, value: object) -> None:
        while not self._closed:
            with suppress(queue.Full):
                return self._ready.put(value, timeout=POLL_SECONDS)

    def _turn(self) -> tuple[int, int]:
        """The worker that makes the next batch, and its count; torch gives the batches out in turn."""
        turn = self._taken % max(self.workers, 1)
        return turn, self.pulse.counts[turn]

    def _check(self, turn: int, waited: float, *, begun: bool) -> None:
        """WorkerFailure if a worker is dead, or that whose turn it is stands still for too long."""
        self._check_alive()
        if waited < self.patience * (1 if begun else START_UP):
            return
        if not self.workers:
            raise WorkerFailure(f"reading data has made no progress for {waited:.0f} s; {self._advice()}")
        # The batch of another may be in the way: they come through one queue.
        states = ["".join(process_facts(process.pid or 0)[:1]) for process in self._processes]
        turn = states.index("T") if "T" in states else turn
        name = f"data worker {turn} of {self.workers} (process {self._processes[turn].pid})"
        if (free := free_shared_memory()) is not None and free < self.batch_bytes:
            raise WorkerFailure(
                f"{name} cannot hand over its batch: {SHARED_MEMORY} has {size(free)} free, a batch takes "
                f"{size(self.batch_bytes)}; {more_shared_memory(self.prefix)}"
            )
        state = {"T": ", it is stopped (SIGSTOP)", "D": ", it waits for a disk"}.get(states[turn], "")
        raise WorkerFailure(f"{name} has made no progress for {waited:.0f} s{state}; {self._advice()}")

    def _advice(self) -> str:
        return (
            "look at the disk or network that the data is on, or, if it is that slow, raise "
            f"{self.prefix}patience ({self.patience:g} s)"
        )

    def _check_alive(self) -> None:
        for turn, process in enumerate(self._processes):
            if process.exitcode:
                raise WorkerFailure(
                    f"data worker {turn} of {self.workers} (process {process.pid}) {how_it_ended(process.exitcode)}; "
                    f"or take fewer {self.prefix}workers"
                )


def kill(processes: Sequence[BaseProcess]) -> None:
    """End processes, whatever they are doing."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=TAKE_SECONDS)


def leave_signals_to_parent(worker: int) -> None:
    """What tells a run to stop reaches the whole process group; the run still needs batches to end its step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = say_no_more


def say_no_more(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In a worker: a thread that hands batches over has nothing to tell where the run has ended."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def how_it_ended(code: int) -> str:
    """What ended a process, by its exit code, and what to look at."""
    if code >= 0:
        return f"ended with code {code}: its message is above. Mend that"
    with suppress(ValueError):
        name = signal.Signals(-code).name
        advice = {
            "SIGKILL": "so the system does where memory runs out. Give it more memory",
            "SIGBUS": "so it goes where shared memory is full, or a file shrinks while it is read. Mend that",
        }.get(name, "its message may be above. Mend that")
        return f"was killed by {name}: {advice}"
    return f"was killed by signal {-code}. Mend that"


def free_shared_memory() -> int | None:
    """Bytes free in the shared memory that batches travel in; None where it is not known to be limited."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def check_shared_memory(workers: int, batch_bytes: int, *, prefix: str = "") -> None:
    """ConfigError unless the batches that workers of all processes of this machine have under way fit."""
    free = free_shared_memory()
    if not workers or free is None:
        return
    processes = max(environment_number("LOCAL_WORLD_SIZE"), 1)
    under_way = AHEAD * workers + HELD
    needed = processes * under_way * batch_bytes
    if needed <= free:
        return
    fewer = (free // (processes * max(batch_bytes, 1)) - HELD) // AHEAD
    several = f", in each of {processes} processes" if processes > 1 else ""
    raise ConfigError(
        f"{workers} data workers have up to {under_way} batches of {size(batch_bytes)} under way{several}, "
        f"{size(needed)} in all, and {SHARED_MEMORY} has {size(free)} free: "
        + (f"{prefix}workers {fewer} fits; or " if 0 < fewer < workers else "")
        + more_shared_memory(prefix)
    )


def more_shared_memory(prefix: str) -> str:
    """What to do where there is too little."""
    return f"take smaller batches, {prefix}workers 0, or more shared memory (docker run --shm-size 8g)"


def size(number: int) -> str:
    """Bytes in words."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
