"""The targets of the project, and what a harvest says of each. A figure that did not come back is "not measured"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harvest_data import Harvest, Timing, in_call

NOT_MEASURED = "not measured"
DTYPES = ("bf16", "fp16")
"""Targets hold in either; the first that was measured counts."""


@dataclass(frozen=True)
class Target:
    """One figure.

    Attributes:
        name: of the figure.
        known: the highest known elsewhere, in words.
        wanted: its steps in ascending order of difficulty.
        unit: after the numbers.
        at_most: whether smaller is better.
        measure: what a harvest says: (value, words after it), or None, or why not in words.
    """

    name: str
    known: str
    wanted: tuple[float, ...]
    unit: str
    measure: Callable[[Harvest], Found]
    at_most: bool = False

    def row(self, harvest: Harvest) -> tuple[str, str, str, str, str]:
        """Figure, highest known, wanted, measured, met or not."""
        sign = "<=" if self.at_most else ">="
        steps = ", then ".join(number(step) for step in self.wanted)
        wanted = f"{sign} {steps} {self.unit}".rstrip()
        found = None if harvest.dry_run else self.measure(harvest)
        if found is None or isinstance(found, str):
            return self.name, self.known, wanted, f"{NOT_MEASURED}{f': {found}' if found else ''}", ""
        value, words = found
        measured = f"{number(value)} {self.unit}".rstrip() + (f" ({words})" if words else "")
        if math.isinf(value):
            measured = words
        return self.name, self.known, wanted, measured, self.verdict(value)

    def verdict(self, value: float) -> str:
        """met, met up to a step, or not met."""
        met = [step for step in self.wanted if (value <= step if self.at_most else value >= step)]
        if not met:
            return "not met"
        return "met" if len(met) == len(self.wanted) else f"met up to {number(met[-1])}"


Found = tuple[float, str] | str | None


def number(value: float) -> str:
    """Three digits or more, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def at_target(harvest: Harvest, op: str, way: str, part: str | None = None, **more: Any) -> list[Timing]:
    """Timings at the target's shape in the first dtype that has any; ours in the launch table's configuration."""
    more |= {"part": part} if part else {}
    for dtype in DTYPES:
        found = [
            time
            for time in harvest.timings(op=op, way=way, dtype=dtype, **({"default": True} | more))
            if time.shape.is_target
        ]
        if found:
            return found
    return []


def most_repeats(times: Sequence[Timing]) -> Timing | None:
    """The timing that rests on the most samples."""
    return max(times, key=lambda time: time.repeats, default=None)


def rate(op: str) -> Callable[[Harvest], Found]:
    """TFLOP/s of ours on visible pairs, as the launch table is today."""

    def measure(harvest: Harvest) -> Found:
        if time := most_repeats(at_target(harvest, op, "ours")):
            return (
                time.flop_per_s / 1e12,
                f"{time.p50:.4g} ms, {time.dtype}, noise {time.shown_noise}{in_call(time.part)}",
            )
        if op == "backward" and (parts := both_gradients(harvest, best=False)):
            return backward_rate(parts), f"dQ and dK/dV added up{in_call(*(time.part for time in parts))}"
        return None

    return measure


def best_rate(op: str) -> Callable[[Harvest], Found]:
    """The same in the fastest configuration that was timed."""

    def measure(harvest: Harvest) -> Found:
        if op == "backward":
            parts = both_gradients(harvest, best=True)
            words = "; ".join(f"{time.op} {time.config}{in_call(time.part)}" for time in parts)
            return (backward_rate(parts), words) if parts else None
        time = fastest(harvest, op)
        return (time.flop_per_s / 1e12, f"{time.config}{in_call(time.part)}") if time else None

    return measure


def fastest(harvest: Harvest, op: str) -> Timing | None:
    """Of all configurations of ours at the target, the one with the least median."""
    for dtype in DTYPES:
        times = [x for x in harvest.timings(op=op, way="ours", dtype=dtype) if x.shape.is_target and x.config]
        if times:
            return min(times, key=lambda time: time.p50)
    return None


def both_gradients(harvest: Harvest, *, best: bool) -> list[Timing]:
    """dQ and dK/dV at the target, or nothing where one of them is missing."""
    found = [fastest(harvest, op) if best else most_repeats(at_target(harvest, op, "ours")) for op in ("dq", "dkdv")]
    return [] if None in found else found


def backward_rate(parts: Sequence[Timing]) -> float:
    """TFLOP/s of a backward pass made of two kernels."""
    shape = parts[0].shape
    return 10 * shape.size * shape.visible_pairs / (sum(time.p50 for time in parts) / 1e3) / 1e12


def times_faster(op: str, peer: str) -> Callable[[Harvest], Found]:
    """How many times as long a peer takes; both from one part, where they are measured in turn."""

    def measure(harvest: Harvest) -> Found:
        for theirs in sorted(at_target(harvest, op, peer), key=lambda time: -time.repeats):
            ours = [x for x in at_target(harvest, op, "ours", part=theirs.part) if x.dtype == theirs.dtype]
            if ours and (mine := most_repeats(ours)):
                return theirs.p50 / mine.p50, f"{theirs.p50:.4g} ms beside {mine.p50:.4g} ms{in_call(mine.part)}"
        return failure(harvest, peer)

    return measure


def failure(harvest: Harvest, way: str) -> str | None:
    """Why a way has no time, if a row says so."""
    rows = harvest.of("failure", way=way)
    return f"{way}: {rows[-1].get('reason')}{in_call(rows[-1].get('part'))}" if rows else None


SHORTEST, LONGEST = 50, 1025


def scaling(op: str) -> Callable[[Harvest], Found]:
    """Largest over smallest time of a visible pair, over the lengths from 50 to 1025 that one part timed."""

    def measure(harvest: Harvest) -> Found:
        for dtype in DTYPES:
            times = harvest.timings(op=op, way="ours", dtype=dtype, default=True)
            for part in dict.fromkeys(time.part for time in times):
                # Milliseconds by pair are 1e-3 / 1e-12 picoseconds.
                pairs = {
                    time.shape.tokens: 1e9 * time.p50 / time.shape.visible_pairs for time in times if time.part == part
                }
                if {SHORTEST, LONGEST} <= set(pairs):
                    words = ", ".join(f"N {n}: {value:.3g}" for n, value in sorted(pairs.items()))
                    return max(pairs.values()) / min(pairs.values()), f"ps a pair at {words}{in_call(part)}"
        return None

    return measure


def over_contiguous(harvest: Harvest) -> Found:
    """Forward time with a gather by permutation over that of contiguous input, in percent more."""
    for gathered in at_target(harvest, "forward", "ours_gather"):
        ours = [x for x in at_target(harvest, "forward", "ours", part=gathered.part) if x.dtype == gathered.dtype]
        if mine := most_repeats(ours):
            return 100 * (gathered.p50 / mine.p50 - 1), (
                f"{gathered.p50:.4g} ms beside {mine.p50:.4g} ms{in_call(mine.part)}"
            )
    return failure(harvest, "ours_gather")


def embedding(harvest: Harvest) -> Found:
    """Share of copy bandwidth, from rows "bandwidth" of the embedding."""
    rows, copy = harvest.of("bandwidth", op="permuted_embed"), harvest.ceiling("copy_bytes_per_s")
    if not rows or not copy:
        return None
    rate = rows[-1]["bytes_per_s"]
    return 100 * rate / copy, f"{rate / 1e12:.3g} of {copy / 1e12:.3g} TB/s{in_call(rows[-1].get('part'))}"


def kmeans_row(harvest: Harvest, way: str = "exact") -> dict[str, Any] | None:
    """The last row of a way at D = 4096, K = 8192."""
    found = [
        row
        for row in harvest.of("kmeans", way=way)
        if (row["shape"].get("features"), row["shape"].get("clusters")) == (4096, 8192)
    ]
    return found[-1] if found else None


def kmeans_rate(way: str) -> Callable[[Harvest], Found]:
    """TFLOP/s of the assignment."""

    def measure(harvest: Harvest) -> Found:
        row = kmeans_row(harvest, way)
        return (row["flops_per_s"] / 1e12, f"{row['p50_ms']:.4g} ms{in_call(row.get('part'))}") if row else None

    return measure


def kmeans_memory(harvest: Harvest) -> Found:
    """Peak memory of the exact assignment beyond its operands, in percent of a 16-bit matrix of rows and centroids."""
    row = kmeans_row(harvest)
    if row is None or row.get("extra_bytes") is None or not row["shape"].get("rows"):
        return None
    matrix = 2 * row["shape"]["rows"] * row["shape"]["clusters"]
    return 100 * row["extra_bytes"] / matrix, f"{row['extra_bytes'] / 2**20:,.0f} MiB{in_call(row.get('part'))}"


def kmeans_ids(harvest: Harvest) -> Found:
    """Rows "check" of the exact ids: the worst excess of a distance over its budget."""
    rows = [row for row in harvest.of("check") if "k-means" in row["what"]]
    if not rows:
        return None
    right = sum(bool(row["ok"]) for row in rows)
    return 100 * right / len(rows), f"{right} of {len(rows)} checks{in_call(*(row.get('part') for row in rows))}"


MASKED = "irregular masks at best 75; unmasked 272 (FA3)"
FORWARD, BACKWARD = (220, 280, 350), (150, 200, 270)
"""TFLOP/s on visible pairs, wanted of attention."""
KERNELS: Sequence[Target] = (
    Target("attention forward", "333-340, unmasked, seq 512, H100", FORWARD, "TFLOP/s", rate("forward")),
    Target("the same, best configuration timed", "", FORWARD, "TFLOP/s", best_rate("forward")),
    Target("forward against FlexAttention", "1", (2,), "times", times_faster("forward", "flex")),
    Target("forward against SDPA with a mask", "1", (5,), "times", times_faster("forward", "sdpa_mask")),
    Target("forward against the official way", "1", (10,), "times", times_faster("forward", "official")),
    Target("attention backward", MASKED, BACKWARD, "TFLOP/s", rate("backward")),
    Target("the same, best configurations timed", "", BACKWARD, "TFLOP/s", best_rate("backward")),
    Target("backward against FlexAttention", "1", (2.5,), "times", times_faster("backward", "flex")),
    *(
        Target(f"longest over shortest time of a visible pair, N = 50 to 1025, {op}", "", (1.3,), "times",
               scaling(op), at_most=True)
        for op in ("forward", "backward")
    ),
    Target("attention memory beyond O(B H N)", "O(B H N^2), official", (0,), "bytes",
           lambda _: "tests/test_gpu_bench.py holds it", at_most=True),
    Target("gather by permutation over contiguous input", "a separate pass", (10,), "% more", over_contiguous,
           at_most=True),
    Target("permuted embedding, of copy bandwidth", "several elementwise passes", (80,), "%", embedding),
    Target("k-means, exact, D 4096, K 8192", "467-563 at D <= 512 (flashlib)", (600,), "TFLOP/s", kmeans_rate("exact")),
    Target("the same, fast", "467-563 at D <= 512 (flashlib)", (600,), "TFLOP/s", kmeans_rate("fast")),
    Target("k-means ids equal to the float64 argmin", "", (100,), "% of checks", kmeans_ids),
    Target("k-means memory, of a 16-bit N x K matrix", "100", (99,), "%", kmeans_memory, at_most=True),
)  # fmt: skip
"""H200, bf16 or fp16, head size 64, N = 197, c = 50, B x H = 3072 unless said; TFLOP/s on visible pairs."""


@dataclass(frozen=True)
class Model:
    """A model's step: what the paper's V100 and others reach, and what is wanted, images per second."""

    label: str
    paper: int
    elsewhere: str
    wanted: tuple[float, ...]
    gflop: float  # of an image, forward and backward, last block pruned


MODELS = {
    "base": Model("ViT-B, c = 60", 70, "plain ViT-B 1459 on H100", (1800, 2225), 232),
    "small": Model("ViT-S, c = 50", 139, "plain ViT-S class 8003 on H100", (4000, 6500), 64),
    "tiny": Model("ViT-T, c = 50", 278, "-", (9000, 15000), 18),
}
OFFICIAL_STEP = 5.0
"""Times as fast as the official code, at least."""


def best_step(harvest: Harvest, model: str, way: str = "ours", **more: Any) -> dict[str, Any] | None:
    """The last row of the fastest mode; rows of another kind of device code (tuned tables, Volta's) are left out.

    more: values that other fields must have.
    """
    newest = {
        row["mode"]: row
        for row in harvest.of("step", model=model, way=way, **more)
        if row.get("backend", "auto") == "auto" and not row.get("tuned") and row.get("dtype", "bf16") == "bf16"
    }
    return max(newest.values(), key=lambda row: row["images_per_s"], default=None)


def step_targets() -> Iterator[Target]:
    """Speed of each model, and its ratio to the official way."""
    for name, model in MODELS.items():

        def speed(harvest: Harvest, name: str = name, model: Model = model) -> Found:
            row = best_step(harvest, name)
            if row is None:
                return None
            flop, ceiling = row["images_per_s"] * model.gflop * 1e9, harvest.ceiling("matmul_bf16_flops_per_s")
            share = f", {flop / ceiling:.0%} of the matmul ceiling" if ceiling else ""
            words = f"{row['mode']}, batch {row.get('batch')}, {flop / 1e12:.3g} TFLOP/s{share}"
            words += f"; {row['images_per_s'] / model.paper:.3g} times the paper's V100"
            return row["images_per_s"], words + in_call(row.get("part"))

        def against(harvest: Harvest, name: str = name) -> Found:
            # Measured in turn: in one part, the last one that has both.
            for part in reversed(dict.fromkeys(row.get("part") for row in harvest.of("step", model=name))):
                ours, official = (best_step(harvest, name, way, part=part) for way in ("ours", "official"))
                if ours is not None and official is not None:
                    words = f"official {number(official['images_per_s'])}/s{in_call(part)}"
                    return ours["images_per_s"] / official["images_per_s"], words
            return failure(harvest, "official")

        known = f"paper, one V100: {model.paper}; {model.elsewhere}"
        yield Target(model.label, known, model.wanted, "images/s", speed)
        yield Target(f"{model.label}, against the official code", "1", (OFFICIAL_STEP,), "times", against)


MEMORY_CASES = ((96, "none", "nothing recomputed"), (128, "cheap", "cheap recomputation"), (512, "blocks", "blocks"))
CAP = 16 << 30


def memory_row(harvest: Harvest, images: int, recompute: str) -> dict[str, Any] | None:
    """The last row of a case of ViT-B."""
    rows = harvest.of("memory", model="base", micro_batch=images, recompute=recompute)
    return rows[-1] if rows else None


def memory_targets() -> Iterator[Target]:
    """Peak under the cap, and the plan's error, of each case."""
    for images, recompute, words in MEMORY_CASES:

        def peak(harvest: Harvest, images: int = images, recompute: str = recompute) -> Found:
            row = memory_row(harvest, images, recompute)
            if row is not None and row.get("fits") is False:
                return math.inf, f"out of memory{in_call(row.get('part'))}"
            if row is None or not row.get("peak_bytes"):
                return None
            return row["peak_bytes"] / 2**30, in_call(row.get("part")).removeprefix(", ")

        def plan(harvest: Harvest, images: int = images, recompute: str = recompute) -> Found:
            row = memory_row(harvest, images, recompute)
            if row is None or not row.get("peak_bytes"):
                return None
            off = 100 * abs(row["planned_bytes"] / row["peak_bytes"] - 1)
            words = f"planned {row['planned_bytes'] / 2**30:.2f} GiB, peak {row['peak_bytes'] / 2**30:.2f} GiB"
            return off, words + in_call(row.get("part"))

        name = f"ViT-B, micro-batch {images}, {words}"
        yield Target(f"{name}: peak", "the paper's batch is 32", (CAP / 2**30,), "GiB", peak, at_most=True)
        yield Target(f"{name}: plan off by", "", (10,), "%", plan, at_most=True)
    yield Target("speed lost by cheap recomputation", "", (5,), "%", lambda _: None, at_most=True)


STEPS = tuple(step_targets())
MEMORY = tuple(memory_targets())
HEAD = ("figure", "highest known", "wanted", "measured", "met or not")


def rows(targets: Sequence[Target], harvest: Harvest) -> list[tuple[str, str, str, str, str]]:
    """The lines of a table under HEAD."""
    return [target.row(harvest) for target in targets]
