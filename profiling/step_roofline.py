"""What each part of a training step could gain: python profiling/step_roofline.py --workload.device cuda

For every part, forward and backward: the FLOPs of its products, the bytes that its operators read and write, the time
that the slower of the two would take at this machine's own rates (measured first), the time it took, and the gap.

Bytes count every operator's inputs and outputs once, as the step is written now, so the floor is that of the same
operators without caches between them; fusing operators lowers it.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch
import tyro
from step_timeline import PartTime, Timeline, measure
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from workload import PartMode, Workload, named_parts, synchronize

from mapet_kernels.registry import REGISTRY, TwoStreamShape

BACKWARD_PRODUCTS = 2.5
"""Matrix products of attention's backward pass to those of its forward pass: five to two, S and dP recomputed."""


@dataclass(frozen=True)
class Rates:
    """What this machine does: FLOP a second of a large matrix product, bytes a second of a large copy."""

    flops: float
    bandwidth: float


@dataclass
class Work:
    """FLOPs and bytes of a part of one step."""

    flops: float = 0.0
    bytes: float = 0.0

    def floor(self, rates: Rates) -> float:
        """Milliseconds at the machine's rates."""
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth) * 1e3


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds."""

    part: str
    direction: str
    flops: float
    bytes: float
    floor: float
    measured: float

    @property
    def gap(self) -> float:
        """What would be gained at the floor."""
        return self.measured - self.floor


class WorkCounter(PartMode):
    """Adds up FLOPs and bytes by (part, direction) while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[tuple[str, str], Work] = defaultdict(Work)
        self.part_of_node: dict[int, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        node = torch._C._current_autograd_node()
        if node is None:
            part = self.part_of_node[torch.autograd._get_sequence_nr() - 1] = self.ranges[-1]
        else:
            part = self.part_of_node.get(node._sequence_nr(), "other")
        work = self.work[part, "forward" if node is None else "backward"]
        work.flops += flops_of(func, args, kwargs, out)
        work.bytes += sum(
            t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)
        )
        return out


def flops_of(func, args, kwargs, out) -> float:
    """FLOPs of an operator: torch's own count, two-stream attention over visible pairs."""
    if "two_stream_attention_packed" in str(func):
        backward = "backward" in str(func)
        kv, cut, targets, mask_tokens = (args[2], args[5], args[6], args[7]) if backward else args[1:5]
        q = args[1] if backward else args[0]
        batch, rows, _, heads, size = kv.shape
        tokens = rows - targets if mask_tokens else rows
        with_content = q.shape[0] != batch * targets
        shape = TwoStreamShape(tokens, cut, batch, heads, size, mask_tokens, with_content=with_content)
        flops, _ = REGISTRY["two_stream_attention"].cost(shape, kv.dtype)
        return flops * (BACKWARD_PRODUCTS if backward else 1)
    counted = flop_registry.get(func.overloadpacket)
    return counted(*args, **kwargs, out_val=out) if counted else 0.0


def count(workload: Workload) -> dict[tuple[str, str], Work]:
    """FLOPs and bytes of one step, by part and direction."""
    step, counter = workload.build(), WorkCounter()
    step(0)  # optimizer states are made in the first step
    with named_parts(step, counter.part_range), counter:
        step(1)
    return dict(counter.work)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Best of five: a square matrix product in `dtype`, and a copy counted as bytes read and written."""
    size, count = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(
        2 * size**3 / _fastest(lambda: a @ b, device), 2 * count / _fastest(lambda: target.copy_(source), device)
    )


def table(work: dict[tuple[str, str], Work], parts: list[PartTime], rates: Rates) -> list[Row]:
    """Every part and direction that was measured or counted, the largest gap first."""
    measured = {(p.part, way): getattr(p, way) for p in parts for way in ("forward", "backward")}
    rows = [
        Row(*key, amount.flops, amount.bytes, amount.floor(rates), measured.get(key, 0.0))
        for key in work.keys() | measured.keys()
        for amount in [work.get(key, Work())]
    ]
    return sorted((row for row in rows if row.measured or row.flops), key=lambda row: -row.gap)


def as_markdown(rows: list[Row], rates: Rates) -> str:
    """The table and the rates it rests on."""
    lines = [
        f"matrix product {rates.flops / 1e12:.2f} TFLOP/s, copy {rates.bandwidth / 1e9:.1f} GB/s, both measured here\n",
        "| part | direction | GFLOP | MB | floor ms | measured ms | gap ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.part} | {row.direction} | {row.flops / 1e9:.2f} | {row.bytes / 1e6:.1f} "
        f"| {row.floor:.3f} | {row.measured:.3f} | {row.gap:.3f} |"
        for row in rows
    ]
    floor, measured = (math.fsum(getattr(row, name) for row in rows) for name in ("floor", "measured"))
    return "\n".join([*lines, f"| all | | | | {floor:.3f} | {measured:.3f} | {measured - floor:.3f} |"])


def main() -> None:
    options = tyro.cli(Timeline, description=__doc__)
    rates = measure_rates(torch.device(options.workload.device), options.workload.dtype)
    work = count(options.workload)
    summary, _ = measure(options)
    rows = table(work, summary.parts, rates)
    print(as_markdown(rows, rates))
    path = options.output / "step_roofline.json"
    path.write_text(json.dumps({"rates": asdict(rates), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print(f"numbers: {path}")


def _fastest(run, device: torch.device) -> float:
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    main()
