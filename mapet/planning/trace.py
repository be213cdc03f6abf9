"""What the real step of any task takes, by running it on fake tensors: bytes by part, FLOP, bytes read and written.

Fake tensors have shapes, dtypes and storages, but no memory and no values; a dispatch mode counts every storage that an
operator returned, while it lives. A GPU cannot be faked through a backward pass on a machine without one, so the step
is faked on the CPU, with a GPU's sizes of chunks. Our own operators and torch's attention are one operator each, which
keeps queries, keys, values, result and log-sum-exp, whatever kernel there is on the GPU.

The switches of section speed are off, and stochastic depth drops nothing: no step needs more than what is counted.

Blocks that are alike take alike: a deep network is traced with 3 and 4 of them, and each moment of a step, counted from
the first block or from the last, goes on in a straight line from there.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import mapet_kernels.flops  # noqa: F401
from mapet.config import DataConfig, RunConfig, SpeedConfig, TrainConfig
from mapet.errors import ConfigError
from mapet.objectives import build_task
from mapet.objectives.loss import chunks_as_on
from mapet.rng import StepRng
from mapet.task import Task
from mapet.training.optim import WeightAverage, clip_gradients, gated_step, make_optimizer, trained
from mapet.training.precision import AUTOCAST

SHALLOW = (3, 4)
"""Units of the networks that stand for a deeper one: the first, the last, and one or two between them."""

FEW_IMAGES = (128, 256, 384)
"""Of micro-batches that stand for a larger multiple, of blocks that are computed again in parts of 128 images or so."""
LARGEST_TRACED = 512
MOST_IMAGES = 2**14
"""Micro-batch for which they do not."""

Moment = tuple[str, int | None]
"""A pass of the step, and the unit that it is at."""
Parts = dict[str, int]
"""Bytes by part of the memory, see memory.Memory."""
Work = Counter[tuple[str, float, float]]
"""How often an operator of a kind (product, attention, attention backward, pass) has so many FLOP and bytes."""


@dataclass(frozen=True)
class Network:
    """What a task is made of.

    Attributes:
        weights, learning: bytes of all parameters, and of those that learn: around the units, then of each unit.
        image_bytes: of one image of a batch, whole numbers as the uint16 that they are stored as.
        repeats: whether there are model.depth units, all alike.
    """

    weights: tuple[int, ...]
    learning: tuple[int, ...]
    image_bytes: int
    repeats: bool

    @classmethod
    def of(cls, task: Task) -> Network:
        units = task.units()
        kinds = {(type(u), *((n, p.shape, p.dtype, p.requires_grad) for n, p in u.named_parameters())) for u in units}

        def sizes(learning: bool) -> tuple[int, ...]:
            around, *each = (
                sum(p.nbytes for p in module.parameters() if p.requires_grad or not learning)
                for module in (task, *units)
            )
            return (around - sum(each), *each)

        image = sum(x.numel() * (2 if x.dtype == torch.int64 else x.element_size()) for x in task.example(1).values())
        return cls(sizes(False), sizes(True), image, len(kinds) == 1 and len(units) == task.config.depth)


@dataclass(frozen=True)
class Trace:
    """One step on one process.

    Attributes:
        peaks: the most that exists during each moment.
        work: operators of a micro-batch's forward and backward pass.
        update: operators of the update.
        rows: of the tensors that go into the first unit; 0 without units.
        calls: of the first unit: several where a task takes a micro-batch in parts.
    """

    peaks: dict[Moment, Parts]
    work: Work
    update: Work
    rows: int
    calls: int
    network: Network

    @property
    def peak(self) -> int:
        """Bytes at the moment at which there are most."""
        return max(sum(parts.values()) for parts in self.peaks.values())


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operator returned while it lives; `peak` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function.namespace == "prim":  # asks a fake tensor for its device
            return result
        self.add_all(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.peak = max(self.peak, self.live)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on until it is gone."""
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.known:
            self.known[key] = storage.nbytes(), weakref.ref(storage, lambda _: self.remove(key))
            self.live += storage.nbytes()

    def add_all(self, tensors: Iterable[Tensor]) -> None:
        """Count several; no name is left behind that would keep one alive."""
        for tensor in tensors:
            self.add(tensor)

    def remove(self, key: int) -> None:
        """Count a storage no longer."""
        self.live -= self.known.pop(key)[0]


class Counting(LiveBytes):
    """Also counts by part, with a peak of every moment, and the work that operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "weights"  # of what operators return from now on
        self.moment: Moment | None = None
        self.parts: Counter[str] = Counter()
        self.part_of: dict[int, str] = {}
        self.peaks: dict[Moment, Parts] = {}
        self.work: Work = Counter()
        self.rows, self.calls, self.forward = 0, 0, True

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if self.part == "weights" and function is torch.ops.aten._local_scalar_dense.default:
            return 0  # to an initialiser that looks at what it drew
        in_place = function._schema.name.endswith("_") and torch.Tag.inplace_view not in function.tags
        if self.part == "weights" and in_place and arguments:
            return arguments[0]  # what fills a tensor leaves its shape
        options = options or {}
        result = super().__torch_dispatch__(function, types, arguments, options)
        if self.moment is None or function.is_view or function.namespace == "prim":
            return result
        if self.live > sum(self.peaks.get(self.moment, {}).values()):
            self.peaks[self.moment] = dict(self.parts)
        read, returned = tensors((arguments, options)), tensors(result)
        written = returned if function._schema.returns else changed(function, arguments)
        counted = flop_registry.get(function.overloadpacket)
        operations = counted(*arguments, **options, out_val=result) if counted else 0
        kind = "product" if operations else "pass"
        if "attention" in function.name():
            kind = "attention backward" if "backward" in function.name() else "attention"
            if self.moment[0] == "forward":
                self.are([*read, *returned], "attention")
        moved = sum(x.numel() * x.element_size() for x in (*read, *written))
        self.work[kind, float(operations), float(moved)] += 1
        return result

    def add(self, tensor: Tensor) -> None:
        if (key := tensor.untyped_storage()._cdata) not in self.known:
            super().add(tensor)
            self.part_of[key] = self.part
            self.parts[self.part] += self.known[key][0]

    def remove(self, key: int) -> None:
        self.parts[self.part_of.pop(key)] -= self.known[key][0]
        super().remove(key)

    def are(self, found: Iterable[Tensor], part: str) -> None:
        """Count tensors that this step made as another part from now on."""
        for tensor in found:
            key = tensor.untyped_storage()._cdata
            if self.part_of.get(key) in ("activations", "head", "temporary"):
                self.parts[self.part_of[key]] -= self.known[key][0]
                self.parts[part] += self.known[key][0]
                self.part_of[key] = part

    def follow(self, units: list[nn.Module]) -> None:
        """Let `moment` name the unit that the step is at, and `part` what comes after the last of them."""

        def entering(i: int, module: nn.Module, arguments: tuple, options: dict) -> None:
            if self.forward:
                self.moment, self.part = ("forward", i), "activations"
                if i == 0:
                    self.calls += 1
                    self.rows += sum(x.numel() // x.shape[-1] for x in tensors((arguments, options))[:1])

        def leaving(i: int, module: nn.Module, arguments: tuple, result: Any) -> None:
            for tensor in tensors(result):
                if tensor.requires_grad:
                    tensor.register_hook(functools.partial(returning, i))
            if self.forward and i == len(units) - 1:
                self.moment, self.part = ("loss", None), "head"

        def returning(i: int, gradient: Tensor) -> None:
            self.moment = ("backward", i)

        for i, unit in enumerate(units):
            unit.register_forward_pre_hook(functools.partial(entering, i), with_kwargs=True)
            unit.register_forward_hook(functools.partial(leaving, i))


def trace(config: RunConfig, micro_batch: int, share: int, adds_up: bool) -> Trace:
    """One step of a configuration on a process's share of the images.

    Args:
        adds_up: whether gradients exist from the start, as those of other micro-batches or of other processes do.

    Raises:
        ConfigError: the task cannot be traced; the text says why.
    """
    if micro_batch > MOST_IMAGES:
        raise ConfigError(f"train.micro_batch {micro_batch} is not planned: give {MOST_IMAGES} images at most")
    try:
        return _trace(_planned(config), micro_batch, share, adds_up)
    except ConfigError:
        raise
    except Exception as error:  # whatever a task's own code says to tensors without values
        raise ConfigError(
            f"objective {config.objective.name} cannot be planned: its step, tried on tensors without values, ends "
            f"with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def _planned(config: RunConfig) -> RunConfig:
    """What a step's memory depends on, so that alike ones are traced once: whatever kernels there are, without speed.

    The rest of the configuration is at its defaults.
    """
    precision = "bf16" if config.train.precision == "auto" else config.train.precision  # fp16 takes as much
    return RunConfig(
        model=config.model,
        objective=config.objective,
        data=DataConfig(color_jitter=config.data.color_jitter),
        train=TrainConfig(precision=precision, recompute=config.train.recomputed, ema_decay=config.train.ema_decay),
        speed=SpeedConfig(skip_dropped=False),
    )


def network(config: RunConfig) -> Network:
    """What the task of a configuration is made of; nothing is allocated."""
    return _network(_planned(replace(config, train=replace(config.train, recompute="none"))))


@functools.lru_cache(maxsize=16)
def _network(config: RunConfig) -> Network:
    with _built(config) as (task, _):
        return Network.of(task)


@functools.lru_cache(maxsize=256)
def _trace(config: RunConfig, micro_batch: int, share: int, adds_up: bool) -> Trace:
    """By fewer units and fewer images, where these say as much."""
    if config.train.recompute == "blocks" and micro_batch > LARGEST_TRACED and micro_batch % FEW_IMAGES[0] == 0:
        one, two, three = (_trace(config, images, share, adds_up) for images in FEW_IMAGES)
        expected = continued(one, two, one.network, *FEW_IMAGES).peak
        if three.calls > two.calls > one.calls and abs(expected / three.peak - 1) <= 0.005:
            return continued(two, three, one.network, *FEW_IMAGES[1:], micro_batch)
    step, depth, whole = (micro_batch, share, adds_up), config.model.depth, network(config)
    if whole.repeats and depth > SHALLOW[-1]:
        with suppress(Exception):  # what fails for fewer units may do for all
            few, more = (_step(replace(config, model=replace(config.model, depth=d)), *step) for d in SHALLOW)
            sizes = zip(*((sum(n.weights), sum(n.learning)) for n in (few.network, more.network, whole)), strict=True)
            if all(_line(a, b, *SHALLOW, depth) == size for a, b, size in sizes):
                few, more = (by_end(deep, units, depth) for deep, units in zip((few, more), SHALLOW, strict=True))
                return continued(few, more, whole, *SHALLOW, depth)
    return _step(config, *step)


def _step(config: RunConfig, micro_batch: int, share: int, adds_up: bool) -> Trace:
    """The step as the learner takes it, after one that made the optimizer's state."""
    with _built(config) as (task, live):
        optimizer = make_optimizer(task.parameter_groups(config.optim), config.optim)
        live.part = "average"
        average = WeightAverage(task, config.train.ema_decay) if config.train.ema_decay else None
        live.part = "gradients"
        for parameter in trained(task).values():
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: live.are([p.grad], "gradients"))
        live.part = "optimizer"
        skip = torch.zeros(())
        gated_step(optimizer, skip)
        if not adds_up:
            optimizer.zero_grad(set_to_none=True)
        live.part = "images"
        batch, draws = task.example(share), task.draw(share, StepRng(config.train.seed, 0))
        images = slice(0, micro_batch)
        batch, draws = ({name: x[images] for name, x in values.items()} for values in (batch, draws))
        ready = task.ready(draws, torch.device("cpu"))
        live.follow(task.units())
        live.moment, live.part = ("forward", None), "activations"
        with torch.autocast("cpu", AUTOCAST.get(config.train.precision), enabled=config.train.precision in AUTOCAST):
            loss = task(batch, ready, metrics=False)["loss"]
        live.moment, live.part, live.forward = ("loss", None), "temporary", False
        loss.backward()
        work, live.work, live.moment = live.work, Counter(), ("update", None)
        clip_gradients(task.parameters(), config.optim.clip)
        gated_step(optimizer, skip)
        task.after_update(0, skip)
        if average:
            average.update(task, skip)
        live.moment = None
        return Trace(live.peaks, work, live.work, live.rows, live.calls, Network.of(task))


@contextmanager
def _built(config: RunConfig) -> Iterator[tuple[Task, Counting]]:
    """The task, of fake tensors; those that are made within are fake too, and counted."""
    with (
        chunks_as_on("cuda"),
        FakeTensorMode(allow_non_fake_inputs=True),
        Counting() as live,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which copy.deepcopy does
        yield build_task(config).train(), live


def by_end(found: Trace, units: int, depth: int) -> Trace:
    """The trace of a few units with the first two and the last two of them numbered as those of a deep network."""
    ends = {0: 0, 1: 1, depth - 2: units - 2, depth - 1: units - 1, None: None}
    peaks = {(name, k): parts for (name, i), parts in found.peaks.items() for k, j in ends.items() if i == j}
    return replace(found, peaks=peaks)


def continued(few: Trace, more: Trace, network: Network, a: int, b: int, x: int) -> Trace:
    """The trace at x, of traces at a and b."""

    def line(few: Mapping, more: Mapping) -> Counter:
        return Counter({name: _line(few.get(name, 0), more.get(name, 0), a, b, x) for name in {*few, *more}})

    peaks: dict[Moment, Parts] = {moment: line(few.peaks[moment], more.peaks[moment]) for moment in few.peaks}
    rows, calls = (_line(getattr(few, n), getattr(more, n), a, b, x) for n in ("rows", "calls"))
    return Trace(peaks, line(few.work, more.work), line(few.update, more.update), rows, calls, network)


def _line(few: int, more: int, a: int, b: int, x: int) -> int:
    return few + (x - a) * (more - few) // (b - a)


def tensors(values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def changed(function: torch._ops.OpOverload, arguments: tuple) -> list[Tensor]:
    """The tensors that an operator writes, of those that it is given."""
    schema = zip(function._schema.arguments, arguments, strict=False)
    return tensors([value for argument, value in schema if argument.is_write])
