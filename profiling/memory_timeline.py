"""Which part of a training step holds how much memory: python profiling/memory_timeline.py --workload.batch 32

Counts the bytes of every tensor that a step makes, from the operator that made it until it is gone, by the part of the
step that made it; works the same on a CPU and on a GPU, where it leaves out what the allocator adds. Prints who holds
the memory at the peak, and draws the whole step.
"""

from __future__ import annotations

import json
import weakref
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._pytree import tree_leaves
from workload import PartMode, Workload, named_parts

from mapet.report.picture import CYCLE, FAINT, INK, frame, save

BEFORE = "weights and optimizer"
SHOWN = 6
"""Owners drawn by name; the rest together."""


@dataclass(frozen=True)
class MemoryTimeline:
    """What to run, and where the results go."""

    workload: Workload = field(default_factory=Workload)
    output: Path = Path("runs/profile")


@dataclass(frozen=True)
class Moments:
    """Live bytes after every operator of a step.

    Attributes:
        owners: part and pass, such as "mlp, forward", in the order they first appear.
        live: (operators, owners) int64.
    """

    owners: list[str]
    live: np.ndarray

    @property
    def peak(self) -> int:
        """The operator after which the most is live."""
        return int(self.live.sum(1).argmax())

    def at_peak(self) -> dict[str, int]:
        """Bytes of each owner at the peak, the largest first."""
        held = zip(self.owners, self.live[self.peak].tolist(), strict=True)
        return dict(sorted(held, key=lambda item: -item[1]))


class LiveBytes(PartMode):
    """Notes live bytes by owner after every operator while it is active."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.live: dict[str, int] = defaultdict(int)
        self.known: dict[int, tuple[str, int]] = {}
        self.history: list[dict[str, int]] = []
        for tensor in before:
            self._own(tensor, BEFORE)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        backward = torch._C._current_autograd_node() is not None
        owner = "backward" if backward else f"{self.ranges[-1]}, forward"
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._own(leaf, owner)
        self.history.append(dict(self.live))
        return out

    def moments(self) -> Moments:
        """All that was noted."""
        owners = list(dict.fromkeys(name for moment in self.history for name in moment))
        rows = [[moment.get(name, 0) for name in owners] for moment in self.history]
        return Moments(owners, np.array(rows, dtype=np.int64))

    def _own(self, tensor: Tensor, owner: str) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.known:
            self.known[key] = owner, storage.nbytes()
            self.live[owner] += storage.nbytes()
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        owner, size = self.known.pop(key)
        self.live[owner] -= size


def measure(workload: Workload) -> Moments:
    """Live bytes during one step, the first of which made the optimizer's moments."""
    step = workload.build()
    step(0)
    counter = LiveBytes(step.held())
    with named_parts(step, counter.part_range), counter:
        step(1)
    return counter.moments()


def as_table(moments: Moments) -> str:
    """Who holds how much at the peak, as a Markdown table."""
    held = moments.at_peak()
    total = sum(held.values())
    lines = ["| made by | MiB at the peak | share |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {size / 2**20:.1f} | {size / total:.1%} |" for name, size in held.items() if size]
    return "\n".join([*lines, f"| all | {total / 2**20:.1f} | |"])


def draw(moments: Moments, path: Path, title: str) -> Path:
    """Live memory over the step, stacked by owner."""
    held = moments.at_peak()
    named = list(held)[:SHOWN]
    columns = [moments.live[:, moments.owners.index(name)] for name in named]
    rest = moments.live.sum(1) - sum(columns)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    stacked = [column / 2**20 for column in (*columns, rest)]
    axes.stackplot(
        range(len(rest)), *stacked, labels=[*named, "others"], colors=(*CYCLE, FAINT), alpha=0.9, linewidth=0
    )
    top = sum(held.values()) / 2**20
    axes.text(moments.peak, top, f"peak {top:,.0f} MiB", ha="center", va="bottom", color=INK)
    axes.set(xlabel="operators of the step, in order", ylabel="live tensors, MiB", xlim=(0, len(rest)))
    axes.set_ylim(0, 1.12 * top)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, labelcolor=INK, reverse=True)
    frame(axes)
    return save(figure, path, dpi=120)


def main() -> None:
    options = tyro.cli(MemoryTimeline, description=__doc__)
    moments = measure(options.workload)
    workload = options.workload
    title = f"ViT-{workload.model}, {workload.batch} images, {workload.precision}, on {workload.device}"
    picture = draw(moments, options.output / "memory_timeline.png", title)
    numbers = options.output / "memory_timeline.json"
    numbers.write_text(json.dumps({**asdict(workload), "bytes_at_peak": moments.at_peak()}, indent=1) + "\n")
    print(f"{as_table(moments)}\npicture: {picture}\nnumbers: {numbers}")


if __name__ == "__main__":
    main()
