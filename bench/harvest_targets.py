"""The targets of the project, and what a harvest says of each. A figure that did not come back is "not measured"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.harvest_data import HEAD_SIZE_FLOP, Harvest, Timing, in_call

NOT_MEASURED = "not measured"
DTYPES = ("bf16", "fp16")
"""Targets hold in either; the first that was measured counts."""
Found = tuple[float, str] | str | None
"""(value, words after it), or why there is none, or nothing."""


@dataclass(frozen=True)
class Target:
    """One figure.

    Attributes:
        known: the highest known elsewhere, in words.
        wanted: its steps in ascending order of difficulty.
        unit: after the numbers.
        at_most: whether smaller is better.
    """

    name: str
    known: str
    wanted: tuple[float, ...]
    unit: str
    measure: Callable[[Harvest], Found]
    at_most: bool = False

    def row(self, harvest: Harvest) -> tuple[str, str, str, str, str]:
        """Figure, highest known, wanted, measured, met or not."""
        wanted = f"{'<=' if self.at_most else '>='} {', then '.join(map(number, self.wanted))} {self.unit}".rstrip()
        found = None if harvest.dry_run else self.measure(harvest)
        if found is None or isinstance(found, str):
            return self.name, self.known, wanted, f"{NOT_MEASURED}{f': {found}' if found else ''}", ""
        value, words = found
        measured = f"{number(value)} {self.unit}".rstrip() + (f" ({words})" if words else "")
        met = [step for step in self.wanted if (value <= step if self.at_most else value >= step)]
        verdict = f"met up to {number(met[-1])}" if met else "not met"
        verdict = "met" if len(met) == len(self.wanted) else verdict
        return self.name, self.known, wanted, words if math.isinf(value) else measured, verdict


HEAD = ("figure", "highest known", "wanted", "measured", "met or not")


def number(value: float) -> str:
    """Three digits or more, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def at_target(harvest: Harvest, op: str, way: str, **more: Any) -> list[Timing]:
    """Timings at the target's shape in the first dtype that has any, those with the most repeats first."""
    for dtype in DTYPES:
        found = [x for x in harvest.timings(op=op, way=way, dtype=dtype, **more) if x.shape.is_target]
        if found:
            return sorted(found, key=lambda time: -time.repeats)
    return []


def fastest(harvest: Harvest, op: str) -> Timing | None:
    """Of all configurations of ours at the target, the one with the least median."""
    times = [time for time in at_target(harvest, op, "ours") if time.config]
    return min(times, key=lambda time: time.p50, default=None)


def rate(op: str, best: bool, harvest: Harvest) -> Found:
    """TFLOP/s of ours on visible pairs, as the launch table is today, or in the fastest configurations timed."""
    if best:
        times = [fastest(harvest, x) for x in (("dq", "dkdv") if op == "backward" else (op,))]
    else:
        times = at_target(harvest, op, "ours", default=True)[:1] or [None]
    if None in times:
        return None
    shape, milliseconds = times[0].shape, sum(time.p50 for time in times)
    flop = HEAD_SIZE_FLOP[op] * shape.size * shape.visible_pairs
    words = f"{milliseconds:.4g} ms, {times[0].dtype}, noise {times[0].noise}{in_call(times[0].part)}"
    if best:
        words = "; ".join(f"{time.op} {time.config}{in_call(time.part)}" for time in times)
    return flop / (milliseconds / 1e3) / 1e12, words


def beside_ours(harvest: Harvest, op: str, way: str) -> tuple[float, str] | None:
    """How many times as long as ours a way takes; both from one part, where they are measured in turn."""
    for theirs in at_target(harvest, op, way, default=True):
        ours = at_target(harvest, op, "ours", part=theirs.part, default=True)
        if mine := next((time for time in ours if time.dtype == theirs.dtype), None):
            return theirs.p50 / mine.p50, f"{theirs.p50:.4g} ms beside {mine.p50:.4g} ms{in_call(mine.part)}"
    return None


def times_faster(op: str, peer: str, harvest: Harvest) -> Found:
    """How many times as long a peer takes, or why it has no time."""
    return beside_ours(harvest, op, peer) or failure(harvest, peer)


def failure(harvest: Harvest, way: str) -> str | None:
    """Why a way has no time, if a row says so."""
    rows = harvest.of("failure", way=way)
    return f"{way}: {rows[-1].get('reason')}{in_call(rows[-1].get('part'))}" if rows else None


SHORTEST, LONGEST = 50, 1025


def scaling(op: str, harvest: Harvest) -> Found:
    """Largest over smallest time of a visible pair, over the lengths from 50 to 1025 that one part timed."""
    for dtype in DTYPES:
        times = harvest.timings(op=op, way="ours", dtype=dtype, default=True)
        for part in dict.fromkeys(time.part for time in times):
            # Milliseconds by pair are 1e-3 / 1e-12 picoseconds.
            pairs = {x.shape.tokens: 1e9 * x.p50 / x.shape.visible_pairs for x in times if x.part == part}
            if {SHORTEST, LONGEST} <= set(pairs):
                words = ", ".join(f"N {n}: {value:.3g}" for n, value in sorted(pairs.items()))
                return max(pairs.values()) / min(pairs.values()), f"ps a pair at {words}{in_call(part)}"
    return None


def over_contiguous(harvest: Harvest) -> Found:
    """Forward time with a gather by permutation over that of contiguous input, in percent more."""
    found = beside_ours(harvest, "forward", "ours_gather")
    return found and (100 * (found[0] - 1), found[1])


def embedding(harvest: Harvest) -> Found:
    """Percent of the copy bandwidth of this machine."""
    ceiling, rows = harvest.ceiling("copy_bytes_per_s"), harvest.of("bandwidth", op="permuted_embed")
    if not rows:
        return failure(harvest, "permuted_embed")
    rate = rows[-1]["bytes_per_s"]
    return ceiling and (100 * rate / ceiling, f"{rate / 1e12:.3g} TB/s{in_call(rows[-1].get('part'))}")


def kmeans_row(harvest: Harvest, way: str) -> dict[str, Any] | None:
    """The last row of a way at D = 4096, K = 8192."""
    sizes = [(row, row["shape"].get("features"), row["shape"].get("clusters")) for row in harvest.of("kmeans", way=way)]
    return next((row for row, *size in reversed(sizes) if size == [4096, 8192]), None)


def kmeans_rate(way: str, harvest: Harvest) -> Found:
    """TFLOP/s of the assignment."""
    row = kmeans_row(harvest, way)
    return row and (row["flops_per_s"] / 1e12, f"{row['p50_ms']:.4g} ms{in_call(row.get('part'))}")


def kmeans_memory(harvest: Harvest) -> Found:
    """Peak memory of the exact assignment beyond its operands, in percent of a 16-bit matrix of rows and centroids."""
    row = kmeans_row(harvest, "exact")
    if row is None or row.get("extra_bytes") is None or not row["shape"].get("rows"):
        return None
    matrix = 2 * row["shape"]["rows"] * row["shape"]["clusters"]
    return 100 * row["extra_bytes"] / matrix, f"{row['extra_bytes'] / 2**20:,.0f} MiB{in_call(row.get('part'))}"


def kmeans_ids(harvest: Harvest) -> Found:
    """Percent of the checks of exact ids that hold."""
    rows = [row for row in harvest.of("check") if "k-means" in row["what"]]
    right = sum(row["ok"] for row in rows)
    words = f"{right} of {len(rows)} checks{in_call(*(row.get('part') for row in rows))}"
    return (100 * right / len(rows), words) if rows else None


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


def speed(name: str, harvest: Harvest) -> Found:
    """Images a second of a model."""
    row, model, ceiling = best_step(harvest, name), MODELS[name], harvest.ceiling("matmul_bf16_flops_per_s")
    if row is None:
        return None
    flop = row["images_per_s"] * model.gflop * 1e9
    share = f", {flop / ceiling:.0%} of the matmul ceiling" if ceiling else ""
    words = f"{row['mode']}, batch {row.get('batch')}, {flop / 1e12:.3g} TFLOP/s{share}"
    words += f"; {row['images_per_s'] / model.paper:.3g} times the paper's V100"
    return row["images_per_s"], words + in_call(row.get("part"))


def against_official(name: str, harvest: Harvest) -> Found:
    """How many times as fast as the official way; measured in turn: in one part, the last one that has both."""
    for part in reversed(dict.fromkeys(row.get("part") for row in harvest.of("step", model=name))):
        ours, official = (best_step(harvest, name, way, part=part) for way in ("ours", "official"))
        if ours is not None and official is not None:
            words = f"official {number(official['images_per_s'])}/s{in_call(part)}"
            return ours["images_per_s"] / official["images_per_s"], words
    return failure(harvest, "official")


def memory_row(harvest: Harvest, images: int, recompute: str) -> dict[str, Any]:
    """The last row of a case of ViT-B."""
    rows = harvest.of("memory", model="base", micro_batch=images, recompute=recompute)
    return rows[-1] if rows else {}


def peak(images: int, recompute: str, harvest: Harvest) -> Found:
    """GiB of a step."""
    row = memory_row(harvest, images, recompute)
    if row.get("fits") is False:
        return math.inf, f"out of memory{in_call(row.get('part'))}"
    found = row.get("peak_bytes")
    return found and (found / 2**30, in_call(row.get("part")).removeprefix(", "))


def plan_error(images: int, recompute: str, harvest: Harvest) -> Found:
    """Percent that the plan is off the peak."""
    row = memory_row(harvest, images, recompute)
    if not row.get("peak_bytes"):
        return None
    words = f"planned {row['planned_bytes'] / 2**30:.2f} GiB, peak {row['peak_bytes'] / 2**30:.2f} GiB"
    return 100 * abs(row["planned_bytes"] / row["peak_bytes"] - 1), words + in_call(row.get("part"))


def kernels() -> Iterator[Target]:
    """H200, bf16 or fp16, head size 64, N = 197, c = 50, B x H = 3072 unless said; TFLOP/s on visible pairs."""
    passes = (
        ("forward", "333-340, unmasked, seq 512, H100", (220, 280, 350), {"flex": 2, "sdpa_mask": 5, "official": 10}),
        ("backward", "irregular masks at best 75; unmasked 272 (FA3)", (150, 200, 270), {"flex": 2.5}),
    )
    words = {"flex": "FlexAttention", "sdpa_mask": "SDPA with a mask", "official": "the official way"}
    for op, known, wanted, peers in passes:
        yield Target(f"attention {op}", known, wanted, "TFLOP/s", partial(rate, op, False))
        yield Target(f"attention {op}, best configurations timed", "", wanted, "TFLOP/s", partial(rate, op, True))
        for peer, times in peers.items():
            yield Target(f"{op} against {words[peer]}", "1", (times,), "times", partial(times_faster, op, peer))
        name = f"longest over shortest time of a visible pair, N = 50 to 1025, {op}"
        yield Target(name, "", (1.3,), "times", partial(scaling, op), at_most=True)
    name = "gather by permutation over contiguous input"
    yield Target(name, "a separate pass", (10,), "% more", over_contiguous, at_most=True)
    yield Target("permuted embedding, of copy bandwidth", "several elementwise passes", (80,), "%", embedding)
    for way in ("exact", "fast"):
        known = "467-563 at D <= 512 (flashlib)"
        yield Target(f"k-means, {way}, D 4096, K 8192", known, (600,), "TFLOP/s", partial(kmeans_rate, way))
    yield Target("k-means ids equal to the float64 argmin", "", (100,), "% of checks", kmeans_ids)
    yield Target("k-means memory, of a 16-bit N x K matrix", "100", (99,), "%", kmeans_memory, at_most=True)


def steps() -> Iterator[Target]:
    """Speed of each model, its ratio to the official way, and ViT-B under a cap of 16 GiB."""
    for name, model in MODELS.items():
        known = f"paper, one V100: {model.paper}; {model.elsewhere}"
        yield Target(model.label, known, model.wanted, "images/s", partial(speed, name))
        yield Target(f"{model.label}, against the official code", "1", (5,), "times", partial(against_official, name))
    for images, recompute in ((96, "none"), (128, "cheap"), (512, "blocks")):
        name = f"ViT-B, micro-batch {images}, recomputed: {recompute}"
        yield Target(f"{name}: peak", "the paper's batch is 32", (16,), "GiB", partial(peak, images, recompute), True)
        yield Target(f"{name}: plan off by", "", (10,), "%", partial(plan_error, images, recompute), True)


TARGETS: Sequence[Target] = (*kernels(), *steps())
