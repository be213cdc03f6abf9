"""Processes of one run: device, averages and stop signals. A single process needs nothing; torchrun sets the rest.

NCCL carries gradients on GPUs and gloo on the CPU. Stop signals always travel by gloo, on the CPU, so that agreeing on
them never waits for a device.
"""

from __future__ import annotations

import inspect
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mapet.checked import environment_number
from mapet.errors import ConfigError, MapetError

T = TypeVar("T")
POLL_SECONDS = 0.02
ENDING = (signal.SIGTERM, signal.SIGINT)
STOP_SIGNALS = (*ENDING, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@dataclass(frozen=True)
class World:
    """This process among those of the run. `control` is the gloo group for host values, None in a single process."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the output."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module`, which averages its gradients over the processes when there are several."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel
        # Buffers are constants and need no broadcast in every forward pass; newer versions of torch renamed the option.
        renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters
        buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return parallel(module, device_ids=devices, gradient_as_bucket_view=True, **buffers)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a device tensor over the processes, in place; the host does not wait for a GPU."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def mean_gradients(self, module: nn.Module) -> None:
        """What the last backward pass of a step does for `wrap`'s module, for gradients that were left unreduced."""
        for parameter in module.parameters():
            if parameter.grad is not None:
                self.mean(parameter.grad)

    def any(self, here: bool) -> bool:
        """Whether something is so in some process; all of them ask, on the host."""
        if self.size == 1:
            return here
        shared = torch.tensor([int(here)])
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return bool(shared)

    def on_main(self, task: Callable[[], T]) -> T:
        """Run `task` in the main process, while the others wait, and give its result to all.

        Its MapetError is raised in the main process, and one that points there in the others.
        """
        if self.size == 1:
            return task()
        answer: list[Any] = [None, False]
        error = None
        if self.is_main:
            try:
                answer[0] = task()
            except MapetError as caught:
                answer[1], error = True, caught
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if error is not None:
            raise error
        if answer[1]:
            raise MapetError("the main process could not go on; its message says why")
        return answer[0]

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank, in every process; all wait for the last one."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values


@contextmanager
def connect(device: str, *, patience: timedelta | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be the only one.

    `device` is auto, cpu, cuda or cuda:N; with several processes cuda means one GPU each, by LOCAL_RANK. `patience` is
    how long processes wait for each other in `on_main` and `gather`; torch's default where it is None.
    ConfigError when the device is absent or the environment is incomplete.
    """
    size = environment_number("WORLD_SIZE")
    if size == 1:
        yield World(pick_device(device, None))
        return
    chosen = pick_device(device, environment_number("LOCAL_RANK", None))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=store_of_attempt(store, rank, size), rank=rank, world_size=size)
    else:
        try:
            dist.init_process_group(backend)
        except ValueError as error:
            raise ConfigError(f"the environment is not that of torchrun: {error}") from error
    try:
        yield World(chosen, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=patience))
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise MapetError(
            f"another process of this run has ended, so this one cannot go on ({str(error).splitlines()[0]})"
        ) from error
    finally:
        with suppress(RuntimeError):  # torchrun's store, which others take their leave from, may have died before us
            dist.destroy_process_group()


def launch() -> str:
    """What the processes that one torchrun starts, those in place of dead ones too, have in common; "" without one."""
    if (name := os.environ.get("TORCHELASTIC_RUN_ID")) is None:
        return ""
    parent = os.getppid()
    # With the time at which it was started, where that is known, since numbers of processes come again.
    return " ".join((name, socket.gethostname(), str(parent), *process_facts(parent)[19:20]))


def process_facts(pid: int) -> list[str]:
    """What Linux tells of a process after its name (man proc_pid_stat, from its state on); nothing on other systems."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed since another process is gone: gloo has no type of error for that, NCCL has."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return "gloo" in text or "connection closed by peer" in text or "connection reset by peer" in text


def store_of_attempt(store: dist.Store, rank: int, size: int) -> dist.Store:
    """`store` under a name that these processes alone agree on; each of the `size` processes calls this once.

    torchrun's store outlives its processes, so that those it starts again would find addresses of dead ones in it. How
    many restarts a node counts is no such name, as nodes may count differently. So rank 0 draws one, and tells it to
    each of the others in answer to a number that this one has drawn: what the dead have asked and answered is nobody's.

    Raises:
        MapetError: some process did not come within the store's timeout.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        _name_attempt(store, own, size)
        return dist.PrefixStore(own, store)
    store.set(f"mapet/asks/{rank}", own)
    name = store.get(f"mapet/answer/{own}").decode()
    store.set(f"mapet/knows/{name}/{rank}", "")
    return dist.PrefixStore(name, store)


def _name_attempt(store: dist.Store, name: str, size: int) -> None:
    """Answer `name` to every question until all ranks but this one know it."""
    deadline, missing, answered = time.monotonic() + store.timeout.total_seconds(), set(range(1, size)), set()
    while missing := {rank for rank in missing if not store.check([f"mapet/knows/{name}/{rank}"])}:
        if time.monotonic() > deadline:
            raise MapetError(f"processes {sorted(missing)} of {size} did not start within {store.timeout}")
        for asks in [f"mapet/asks/{rank}" for rank in missing]:
            if store.check([asks]) and (asked := store.get(asks).decode()) not in answered:
                store.set(f"mapet/answer/{asked}", name)
                answered.add(asked)
        time.sleep(POLL_SECONDS)


def pick_device(name: str, local_rank: int | None) -> torch.device:
    """The torch device for `name`; `local_rank` is None in a single process. ConfigError when it cannot be had."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if name in ("auto", "cuda"):
        index = local_rank or 0
    elif name.startswith("cuda:") and name[5:].isdecimal():
        if local_rank is not None:
            raise ConfigError(f"device {name} names one GPU, but torchrun gives each process its own: use cuda")
        index = int(name[5:])
    else:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if index >= gpus:
        raise ConfigError(f"device {name}: GPU {index} is asked for and torch sees {gpus}; use cpu, or fewer GPUs")
    return torch.device("cuda", index)


@dataclass(frozen=True)
class Verdict:
    """What the processes agree on, the same in all of them.

    Attributes:
        signal: that some process received; 0 for none.
        lacking: whether some process has nothing to go on with.
    """

    signal: int = 0
    lacking: bool = False


class StopRequest:
    """SIGTERM, SIGINT and SIGHUP as a request to stop after the current step, agreed on by all processes.

    SIGHUP comes where a terminal is closed or a connection lost, and stays ignored where nohup had it so. Within the
    `with` block the first signal is only noted. In a single process a second Ctrl-C interrupts at once; under torchrun
    it does not, since Ctrl-C reaches a process there twice, from the terminal and from torchrun. A process whose
    torchrun has died counts as one that received SIGTERM: nobody else would end it.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._signal = 0
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._shared = torch.zeros(2, dtype=torch.int64)
        self._here = Verdict()
        self._pending: dist.Work | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python sets signal handlers in the main thread only; a run in another thread is stopped by its caller.
        if threading.current_thread() is threading.main_thread():
            heard = [
                number for number in STOP_SIGNALS if number in ENDING or signal.getsignal(number) != signal.SIG_IGN
            ]
            self._previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._signal = max(self._signal, int(number))
        if number == signal.SIGINT and self.world.size == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def orphaned(self) -> bool:
        """Whether the torchrun that started this process is gone."""
        return self._parent is not None and os.getppid() != self._parent

    @property
    def received(self) -> int:
        """The signal that this process was stopped by; 0 for none."""
        return self._signal or (signal.SIGTERM if self.orphaned else 0)

    def post(self, *, lacking: bool = False) -> None:
        """Begin to share what this process received, and whether it lacks what the next step needs."""
        self._here = Verdict(int(self.received), lacking)
        if self.world.size > 1:
            self._shared[0], self._shared[1] = self._here.signal, int(lacking)
            self._pending = dist.all_reduce(self._shared, dist.ReduceOp.MAX, group=self.world.control, async_op=True)

    def agreed(self) -> Verdict:
        """What all processes had posted; in a single process, with what it has received since."""
        if self._pending is None:
            return Verdict(int(self.received), self._here.lacking)
        self._pending.wait()
        self._pending = None
        number, lacking = self._shared.tolist()
        return Verdict(number, bool(lacking))

    def raise_if_received(self, what: str) -> None:
        """End the process as a signal that came would, where nothing is lost by that: KeyboardInterrupt, SystemExit."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped by Ctrl-C while {what}")
        if self.received:
            raise SystemExit(128 + self.received)
