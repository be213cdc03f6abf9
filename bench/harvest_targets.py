"""The targets of the project, and what a harvest says of each. A figure that did not come back is "not measured"."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from bench.harvest_data import HEAD_SIZE_FLOP, Harvest, Timing

NOT_MEASURED = "not measured"
DTYPES = ("bf16", "fp16")
"""Targets hold in either; the first that was measured counts."""
HEAD = ("figure", "highest known", "wanted", "measured", "met or not")
Row = tuple[str, str, str, str, str]
Found = tuple[float, str] | str | None
"""(value, words after it), or why there is none, or nothing."""


def targets(harvest: Harvest) -> Iterator[Row]:
    """All figures beside what is wanted of them, as a table under HEAD; a dry run measures none."""
    yield from kernels(harvest)
    yield from steps(harvest)
    yield from memory(harvest)


def row(
    harvest: Harvest, name: str, known: str, wanted: tuple[float, ...], unit: str, found: Found, at_most: bool = False
) -> Row:
    """wanted: in ascending order of difficulty. at_most: whether smaller is better."""
    wish = f"{'<=' if at_most else '>='} {', then '.join(map(number, wanted))} {unit}"
    if harvest.dry_run or found is None or isinstance(found, str):
        why = f": {found}" if found and not harvest.dry_run else ""
        return name, known, wish, f"{NOT_MEASURED}{why}", ""
    value, words = found
    met = [step for step in wanted if (value <= step if at_most else value >= step)]
    verdict = "not met" if not met else "met" if len(met) == len(wanted) else f"met up to {number(met[-1])}"
    measured = f"{number(value)} {unit}" + (f" ({words})" if words else "")
    return name, known, wish, words if math.isinf(value) else measured, verdict


def number(value: float) -> str:
    """Three digits or more, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


PASSES = {
    "forward": ("333-340, unmasked, seq 512, H100", (220, 280, 350), {"flex": 2, "sdpa_mask": 5, "official": 10}),
    "backward": ("irregular masks at best 75; unmasked 272 (FA3)", (150, 200, 270), {"flex": 2.5}),
}
PEERS = {"flex": "FlexAttention", "sdpa_mask": "SDPA with a mask", "official": "the official way"}


def kernels(harvest: Harvest) -> Iterator[Row]:
    """H200, bf16 or fp16, head size 64, N = 197, c = 50, B x H = 3072 unless said; TFLOP/s on visible pairs."""
    for op, (known, wanted, peers) in PASSES.items():
        today = at_target(harvest, op, "ours", default=True)[:1]
        best = [fastest(harvest, x) for x in (("dq", "dkdv") if op == "backward" else (op,))]
        yield row(harvest, f"attention {op}", known, wanted, "TFLOP/s", rate(op, today))
        yield row(harvest, f"attention {op}, best configurations timed", "", wanted, "TFLOP/s", rate(op, best))
        for peer, times in peers.items():
            found = beside_ours(harvest, op, peer) or failure(harvest, peer)
            yield row(harvest, f"{op} against {PEERS[peer]}", "1", (times,), "times", found)
        name = f"longest over shortest time of a visible pair, N = 50 to 1025, {op}"
        yield row(harvest, name, "", (1.3,), "times", scaling(harvest, op), at_most=True)
    gather = beside_ours(harvest, "forward", "ours_gather")
    found = gather and (100 * (gather[0] - 1), gather[1])
    name = "gather by permutation over contiguous input"
    yield row(harvest, name, "a separate pass", (10,), "% more", found, at_most=True)
    copy, embedding = harvest.ceiling("copy_bytes_per_s"), last(harvest, "bandwidth", op="permuted_embed")
    rate_of = embedding.get("bytes_per_s", 0.0)
    found = (100 * rate_of / copy, f"{rate_of / 1e12:.3g} TB/s") if copy and embedding else None
    name = "permuted embedding, of copy bandwidth"
    yield row(harvest, name, "several elementwise passes", (80,), "%", found or failure(harvest, "permuted_embed"))
    for way in ("exact", "fast"):
        x = kmeans(harvest, way)
        found = (x["flops_per_s"] / 1e12, f"{x['p50_ms']:.4g} ms, {x.get('part')}") if x else None
        name = f"k-means, {way}, D 4096, K 8192"
        yield row(harvest, name, "467-563 at D <= 512 (flashlib)", (600,), "TFLOP/s", found)
    checks = [x["ok"] for x in harvest.of("check") if "k-means" in x["what"]]
    found = (100 * sum(checks) / len(checks), f"{sum(checks)} of {len(checks)} checks") if checks else None
    yield row(harvest, "k-means ids equal to the float64 argmin", "", (100,), "% of checks", found)
    x = kmeans(harvest, "exact")
    matrix = 2 * x["shape"].get("rows", 0) * x["shape"]["clusters"] if x else 0
    extra = x.get("extra_bytes") if x else None
    found = (100 * extra / matrix, f"{extra / 2**20:,.0f} MiB") if matrix and extra is not None else None
    yield row(harvest, "k-means memory, of a 16-bit N x K matrix", "100", (99,), "%", found, at_most=True)


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


def rate(op: str, times: list[Timing | None]) -> Found:
    """TFLOP/s on visible pairs of a pass that is made of these kernels, or is one measurement."""
    if not times or None in times:
        return None
    shape, milliseconds = times[0].shape, sum(time.p50 for time in times)
    configs = "".join(f"; {time.op} {time.config or 'kernels'}, {time.part}" for time in times)
    words = f"{milliseconds:.4g} ms, {times[0].dtype}, noise {times[0].noise}{configs}"
    return HEAD_SIZE_FLOP[op] * shape.size * shape.visible_pairs / (milliseconds / 1e3) / 1e12, words


def beside_ours(harvest: Harvest, op: str, way: str) -> tuple[float, str] | None:
    """How many times as long as ours a way takes; both from one part, where they are measured in turn."""
    for theirs in at_target(harvest, op, way, default=True):
        ours = at_target(harvest, op, "ours", part=theirs.part, default=True)
        if mine := next((time for time in ours if time.dtype == theirs.dtype), None):
            return theirs.p50 / mine.p50, f"{theirs.p50:.4g} ms beside {mine.p50:.4g} ms, {mine.part}"
    return None


def failure(harvest: Harvest, way: str) -> str | None:
    """Why a way has no time, if a row says so."""
    found = last(harvest, "failure", way=way)
    return f"{way}: {found.get('reason')}" if found else None


def last(harvest: Harvest, kind: str, **wanted: Any) -> dict[str, Any]:
    """The newest row of a kind with these values; empty where there is none."""
    rows = harvest.of(kind, **wanted)
    return rows[-1] if rows else {}


SHORTEST, LONGEST = 50, 1025


def scaling(harvest: Harvest, op: str) -> Found:
    """Largest over smallest time of a visible pair, over the lengths from 50 to 1025 that one part timed."""
    for dtype in DTYPES:
        times = harvest.timings(op=op, way="ours", dtype=dtype, default=True)
        for part in dict.fromkeys(time.part for time in times):
            # Milliseconds by pair are 1e-3 / 1e-12 picoseconds.
            pairs = {x.shape.tokens: 1e9 * x.p50 / x.shape.visible_pairs for x in times if x.part == part}
            if {SHORTEST, LONGEST} <= set(pairs):
                words = ", ".join(f"N {n}: {value:.3g}" for n, value in sorted(pairs.items()))
                return max(pairs.values()) / min(pairs.values()), f"ps a pair at {words}, {part}"
    return None


def kmeans(harvest: Harvest, way: str) -> dict[str, Any] | None:
    """The last row of a way at D = 4096, K = 8192."""
    rows = [x for x in harvest.of("kmeans", way=way) if x["shape"].get("features") == 4096]
    return next((x for x in reversed(rows) if x["shape"].get("clusters") == 8192), None)


MODELS = {
    "base": ("ViT-B, c = 60", 70, "plain ViT-B 1459 on H100", (1800, 2225), 232),
    "small": ("ViT-S, c = 50", 139, "plain ViT-S class 8003 on H100", (4000, 6500), 64),
    "tiny": ("ViT-T, c = 50", 278, "-", (9000, 15000), 18),
}
"""(label; images per second of the paper's V100; elsewhere; wanted; GFLOP of an image's step, last block pruned)."""


def steps(harvest: Harvest) -> Iterator[Row]:
    """Speed of each model, and its ratio to the official way, measured in turn: in the last part that has both."""
    ceiling = harvest.ceiling("matmul_bf16_flops_per_s")
    for name, (label, paper, elsewhere, wanted, gflop) in MODELS.items():
        best, found = best_step(harvest, name), None
        if best is not None:
            images, flop = best["images_per_s"], best["images_per_s"] * gflop * 1e9
            share = f", {flop / ceiling:.0%} of the matmul ceiling" if ceiling else ""
            words = f"{best['mode']}, batch {best.get('batch')}, {flop / 1e12:.3g} TFLOP/s{share}"
            found = images, f"{words}; {images / paper:.3g} times the paper's V100; {best.get('part')}"
        yield row(harvest, label, f"paper, one V100: {paper}; {elsewhere}", wanted, "images/s", found)
        found = failure(harvest, "official")
        for part in dict.fromkeys(x.get("part") for x in harvest.of("step", model=name)):
            ours, official = (best_step(harvest, name, way, part=part) for way in ("ours", "official"))
            if ours is not None and official is not None:
                speed = official["images_per_s"]
                found = ours["images_per_s"] / speed, f"official {number(speed)}/s, {part}"
        yield row(harvest, f"{label}, against the official code", "1", (5,), "times", found)


def best_step(harvest: Harvest, model: str, way: str = "ours", **more: Any) -> dict[str, Any] | None:
    """The last row of the fastest mode; rows of another kind of device code (tuned tables, Volta's) are left out.

    more: values that other fields must have.
    """
    newest = {
        x["mode"]: x
        for x in harvest.of("step", model=model, way=way, **more)
        if x.get("backend", "auto") == "auto" and not x.get("tuned") and x.get("dtype", "bf16") == "bf16"
    }
    return max(newest.values(), key=lambda x: x["images_per_s"], default=None)


def memory(harvest: Harvest) -> Iterator[Row]:
    """Peak of a step of ViT-B under a cap of 16 GiB, and the plan's error."""
    for images, recompute in ((96, "none"), (128, "cheap"), (512, "blocks")):
        x = last(harvest, "memory", model="base", micro_batch=images, recompute=recompute)
        part, peak = x.get("part"), (x.get("peak_bytes") or 0) / 2**30
        planned, found, off = x.get("planned_bytes", 0) / 2**30, None, None
        if peak:
            found, off = (peak, str(part)), (100 * abs(planned / peak - 1), f"planned {planned:.2f} GiB, {part}")
        elif x.get("fits") is False:
            found = math.inf, f"out of memory, {part}"
        name = f"ViT-B, micro-batch {images}, recomputed: {recompute}"
        yield row(harvest, f"{name}: peak", "the paper's batch is 32", (16,), "GiB", found, at_most=True)
        yield row(harvest, f"{name}: plan off by", "", (10,), "%", off, at_most=True)
