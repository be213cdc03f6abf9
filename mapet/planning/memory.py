"""How much GPU memory a training step takes, and which micro-batch and recomputation fit a limit.

What a step takes is traced (trace.py), not computed by formulas; the figures are for eager mode, as torch.compile keeps
another set of tensors.

With train.parallel fsdp, n processes share out the parameters; E bytes of them, around the units, are one part, and the
K of each unit another (mapet/training/parallel.py). What is whole and in flight is bounded from above:

    weights     4 P / n, and whole: E, the unit at work, the next one, and the buffer in which it arrives: E + 3 K
    gradients   4 P / n, and whole: E, the unit at work and the one whose are being reduced: E + 2 K; all of them and
                K while gradients add up over micro-batches, for they are reduced once a step
    optimizer   8 P / n; average 4 P / n; update: all in parts, no weight whole
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from mapet.config import Parallel, Recompute, RunConfig
from mapet.errors import ConfigError
from mapet.planning.trace import Network, Trace, trace
from mapet.units import gib, parse_bytes

LEVELS: tuple[Recompute, ...] = get_args(Recompute)
"""Fastest first."""

WORKSPACE = 32 << 20
"""What cuBLAS takes on a GPU of sm_90 beside torch's tensors; less on older ones."""

USABLE = 0.95
"""Part of a limit that a plan fills: the allocator's blocks do not fit together without gaps."""

BUSY_ROWS = 8192
"""Rows that go into the first unit with which a GPU counts as busy: an assumption, used only to choose levels."""

FIRST_GUESS = 64
"""Images of the first micro-batch that is traced where one is to be chosen, about."""
CLEARLY = 1.1
"""How much more than a limit a micro-batch is expected to take that is not traced."""


@dataclass(frozen=True)
class StepSize:
    """What memory depends on: the configuration, but for what a plan chooses.

    Attributes:
        micro_batch: images of a forward pass.
        share: images of this process in a step, all on the device at once.
        processes: with several, gradients exist all the time.
    """

    config: RunConfig
    micro_batch: int
    share: int
    recompute: Recompute = "none"
    processes: int = 1
    parallel: Parallel = "ddp"

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and optimizer state exist in parts."""
        return self.parallel == "fsdp" and self.processes > 1

    def trace(self) -> Trace:
        """The step on fake tensors."""
        config = replace(self.config, train=replace(self.config.train, recompute=self.recompute))
        return trace(config, self.micro_batch, self.share, self.share > self.micro_batch or self.processes > 1)


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the peak, by part; `moment` says which pass of the step is at which unit then."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    images: int = 0
    activations: int = 0
    """What the forward pass keeps, but for attention and what comes after the last unit."""
    attention: int = 0
    """Queries, keys, values, results and log-sum-exps."""
    head: int = 0
    """What comes after the last unit: head and loss."""
    temporary: int = 0
    """Gradients of activations, and what is computed again."""
    workspace: int = WORKSPACE
    moment: str = ""

    @property
    def total(self) -> int:
        """All of it: what torch.cuda.max_memory_allocated reports."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {name: value for name, value in vars(self).items() if name != "moment"}


def predict_memory(size: StepSize) -> Memory:
    """The peak of a training step on one GPU, without the CUDA context. ConfigError for a task that is not traced."""
    return max(moments(size), key=lambda memory: memory.total)


def moments(size: StepSize) -> list[Memory]:
    """Memory at each moment that can be the peak."""
    traced, found = size.trace(), []
    for (name, unit), parts in traced.peaks.items():
        at = name if unit is None else f"{name}, unit {unit + 1} of {len(traced.network.weights) - 1}"
        memory = Memory(**parts, moment=at)
        found.append(in_parts(size, memory, traced.network) if size.sharded else memory)
    return found


def in_parts(size: StepSize, memory: Memory, network: Network) -> Memory:
    """A moment of copies as one of parts (top of the file)."""
    n, ema = size.processes, memory.average > 0
    (around, *units), learning = network.weights, sum(network.learning)
    part, learned = -(-sum(network.weights) // n), -(-learning // n)
    parts = replace(memory, weights=part, gradients=learned, optimizer=2 * learned, average=learned if ema else 0)
    if memory.moment == "update":
        return replace(parts, temporary=learned if ema else 0)
    largest = max(units, default=0)
    weights = around + min(3, len(units) + 1) * largest
    around, *units = network.learning
    largest = max(units, default=0)
    gradients = learning + largest if size.share > size.micro_batch else around + min(2, len(units)) * largest
    return replace(parts, weights=part + weights, gradients=learned + gradients)


@dataclass(frozen=True)
class Plan:
    """How a process's share of a step is divided, and what it takes."""

    micro_batch: int
    accumulation: int
    recompute: Recompute
    memory: Memory


def step_size(config: RunConfig, processes: int, micro_batch: int = 0) -> StepSize:
    """The step of a configuration with this micro-batch, its own, or the whole share. ConfigError if it is uneven."""
    share, micro = config.optim.global_batch // processes, micro_batch or config.train.micro_batch
    if config.optim.global_batch % processes:
        raise ConfigError(f"optim.global_batch {config.optim.global_batch} is not divisible by {processes} processes")
    if share % (micro or share):
        raise ConfigError(f"train.micro_batch {micro} does not divide the {share} images of one process in a step")
    return StepSize(config, micro or share, share, config.train.recomputed, processes, config.train.parallel)


def plan_memory(size: StepSize, limit: int, *, levels: Sequence[Recompute] = LEVELS, micro_batch: int = 0) -> Plan:
    """The fastest level that fits `limit` bytes, with the largest micro-batch that divides the share and fits.

    A level is passed over for a slower one while its micro-batch would leave the GPU idle (BUSY_ROWS), if that helps.

    Args:
        levels: those to choose from.
        micro_batch: the one to take; 0 to choose.

    Raises:
        ConfigError: nothing fits; the text says what would.
    """
    candidates = []
    for level in levels:
        if plan := _largest(replace(size, recompute=level), limit, micro_batch):
            fits = replace(size, recompute=level, micro_batch=plan.micro_batch)
            if plan.micro_batch in (size.share, micro_batch) or fits.trace().rows >= BUSY_ROWS:
                return plan
            candidates.append(plan)
    if not candidates:
        raise ConfigError(nothing_fits(size, limit, levels, micro_batch))
    return max(candidates, key=lambda plan: plan.micro_batch)


def plan_run(config: RunConfig, processes: int) -> Plan:
    """What a configuration leaves to choose, chosen within its limit on memory; without one, what it says.

    That is train.micro_batch 0 and train.recompute auto. ConfigError where nothing fits.
    """
    size, chosen = step_size(config, processes), config.train.recompute
    if not config.train.gpu_memory:
        return Plan(size.micro_batch, size.share // size.micro_batch, size.recompute, predict_memory(size))
    levels = LEVELS if chosen == "auto" else (chosen,)
    return plan_memory(size, parse_bytes(config.train.gpu_memory), levels=levels, micro_batch=config.train.micro_batch)


def nothing_fits(size: StepSize, limit: int, levels: Sequence[Recompute] = LEVELS, micro_batch: int = 0) -> str:
    """Why no plan fits, and what would: other settings first, then more memory."""
    level, smallest = levels[-1], micro_batch or 1
    needed = predict_memory(replace(size, micro_batch=smallest, recompute=level))
    text = f"{gib(limit)} are too little: micro-batch {smallest} with recompute {level} takes {gib(needed.total)}"
    try:
        other = plan_memory(size, limit) if len(levels) < len(LEVELS) or micro_batch else None
    except ConfigError:
        other = None
    if other is not None:
        fits = f"micro-batch {other.micro_batch} with recompute {other.recompute}"
        return f"{text}; {fits} fits, {gib(other.memory.total)}"
    least = replace(size, micro_batch=1, recompute=LEVELS[-1])
    smallest_of_all = predict_memory(least).total
    parts = predict_memory(replace(least, parallel="fsdp")).total
    shared = f"set train.parallel=fsdp (then {gib(parts / USABLE)}), " if parts < smallest_of_all else ""
    return (
        f"{text} ({gib(needed.images)} of that for all images of a step); the least that would do is "
        f"{gib(smallest_of_all / USABLE)}: {shared}give more, spread the global batch over more GPUs, or take a "
        "smaller model"
    )


def out_of_memory_advice(size: StepSize, limit: int) -> str:
    """What to change after a step of `size` did not fit into `limit` bytes (0: unknown), with numbers."""
    predicted = predict_memory(size)
    said = (
        f"out of memory with micro-batch {size.micro_batch} and recompute {size.recompute}, which by "
        f"`mapet plan` take {gib(predicted.total)}" + (f" of {gib(limit)}" if limit else "")
    )
    smaller = [d for d in divisors(size.share) if d < size.micro_batch]
    options = [(smaller[-1], size.recompute)] if smaller else []
    slower = LEVELS[LEVELS.index(size.recompute) + 1 :]
    options += [(size.micro_batch, level) for level in slower]
    choices = [
        f"train.micro_batch={micro} train.recompute={level} (predicted {gib(memory.total)})"
        for micro, level in options
        for memory in [predict_memory(replace(size, micro_batch=micro, recompute=level))]
    ]
    parts = predict_memory(replace(size, parallel="fsdp")).total
    if parts < predicted.total:
        choices.append(f"train.parallel=fsdp (predicted {gib(parts)})")
    if not choices:
        return f"{said}; take a smaller model or more memory"
    automatic = "" if size.sharded else ", or give --auto-batch"
    return f"{said}; set {', or '.join(choices)}{automatic}; what is learned stays the same"


def divisors(number: int) -> list[int]:
    """All of them, in rising order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _largest(size: StepSize, limit: int, micro_batch: int) -> Plan | None:
    """The largest micro-batch that fits, by as few traces as will do."""
    choices, usable = [micro_batch] if micro_batch else divisors(size.share), USABLE * limit
    best, first, last = None, 0, len(choices)  # choices before `first` fit, those from `last` on do not
    at = max(bisect_right(choices, FIRST_GUESS) - 1, 0)
    while first < last:
        micro = choices[at]
        memory = predict_memory(replace(size, micro_batch=micro))
        if memory.total <= usable:
            best, first = Plan(micro, size.share // micro, size.recompute, memory), at + 1
        else:
            last = at
        # At least so much, as more images take more of what is kept, and fewer take less of nothing but of these parts.
        kept = memory.activations + memory.attention
        per_image = [kept / micro, (kept + memory.images + memory.head + memory.temporary) / micro]
        expected = [memory.total + per_image[c < micro] * (c - micro) for c in choices[first:last]]
        last = first + bisect_right(expected, CLEARLY * usable)
        at = max(first + bisect_right(expected, usable) - 1, first)
    return best
