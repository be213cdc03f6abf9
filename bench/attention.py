"""Two-stream attention, forward and backward, beside what users would take instead: time, rates, roofline, memory.

The peers: the official code's way, scaled_dot_product_attention with a boolean mask, and compiled FlexAttention. Every
way is checked against float64 before it is timed; one that errs, fails or is missing is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench import plot, records, roofline, timing
from bench.attention_ways import (
    FLEX_SETTINGS,
    IMAGE_ORDER,
    OURS,
    Way,
    builders,
    own_backends,
    random_operands,
)
from bench.equal_results import yardstick
from bench.guard import Failure, guarded, sigterm_interrupts
from bench.records import device_state
from mapet_kernels.registry import TwoStreamShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, CUT, SIZE = 197, 50, 64
LENGTHS = (50, 344, 785, 1025)
CUT_SHARES = (0.1, 0.9, 0.5, 0.7, 0.3)
HEADS = (3, 6, 12)
SECONDS_A_WAY = 1.5
AUTOTUNE_SECONDS = 120.0
"""What tuning FlexAttention's tiles may take; it cannot be cut short, so that it is not begun with less time left."""


@dataclass(frozen=True)
class AttentionBenchmark:
    """Two-stream attention beside its peers over lengths, cuts and heads. On a GPU up to 7 minutes by default.

    Attributes:
        preset: "quick": the target shape, tokens left in image order, the shortest and the longest sequence; "targets":
            the rows of the project's targets; "tuned_flex": the target shape beside FlexAttention with tuned tiles,
            with which "targets" ends if there is time; "full": every combination, until the time limit.
        device: "cuda", "cpu", or by default a GPU where there is one.
        batch_heads: images times heads at N = 197; longer sequences get fewer images, for equally many tokens.
        heads: heads of an image, where they are not what varies.
        dtype: "bf16", "fp16" or "fp32", where it is not what varies.
        repeats: samples of each way; slow ones get fewer.
        time_limit: seconds after which nothing new is started and what there is becomes the record.
        ways: only these ways, by their name in a record; all when empty.
        output: folder for the record and its picture.
        plot: draw the picture.
    """

    preset: Literal["quick", "targets", "tuned_flex", "full"] = "targets"
    device: str | None = None
    batch_heads: int = 3072
    heads: int = 12
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    repeats: int = 30
    time_limit: float = 420.0
    ways: tuple[str, ...] = ()
    output: Path = records.RESULTS
    plot: bool = True


@dataclass(frozen=True)
class Configuration:
    """One shape, and which ways are measured on it.

    label: what the shape is there for: "target", "order" (tokens in image order), "tokens", "cut", "heads", "dtype",
        "autotuned" (the target once more, beside FlexAttention with tuned tiles), "product".
    ways: "all", "sweep" (of FlexAttention only its best setting at the target), "order", or "autotuned".
    """

    label: str
    shape: TwoStreamShape
    dtype: str
    ways: Literal["all", "sweep", "order", "autotuned"] = "sweep"


@dataclass
class Measurement:
    """A run under way, and what it has found out."""

    options: AttentionBenchmark
    device: torch.device
    clock: timing.Clock
    deadline: timing.Deadline
    rates: roofline.Rates
    flex: str = "flex_one_call_128"
    configurations: list[dict[str, Any]] = field(default_factory=list)


def run(options: AttentionBenchmark) -> Path:
    """Measure, print a line for each way, and return the record's path; what there is survives an interruption.

    Raises:
        ValueError: an option that cannot work.
    """
    device = chosen_device(options)
    chosen = plan(options)
    deadline = timing.Deadline(options.time_limit)
    before = device_state(device)
    clock = timing.clock_for(device)
    rates = roofline.measure(device, {c.dtype: DTYPES[c.dtype] for c in chosen}, clock)
    measurement = Measurement(options, device, clock, deadline, rates)
    draft = records.Draft("attention", f"{options.preset}_{device.type}", options.output)
    stopped = None
    with sigterm_interrupts():
        try:
            for done, configuration in enumerate(chosen):
                if no_time_for(configuration, deadline):
                    stopped = f"time limit of {options.time_limit:g} s after {done} of {len(chosen)} configurations"
                    break
                measurement.configurations.append(measure(configuration, measurement))
                draft.write(summary(measurement, before, None))
        except KeyboardInterrupt:
            stopped = f"interrupted after {len(measurement.configurations)} of {len(chosen)} configurations"
        draft.write(summary(measurement, before, stopped))
        path = draft.finish()
    print(f"stopped: {stopped}\nrecord: {path}" if stopped else f"record: {path}")
    if options.plot and any(map(plot.timed, measurement.configurations)):
        print(f"picture: {plot.draw(path)}")
    return path


def chosen_device(options: AttentionBenchmark) -> torch.device:
    """The device to measure on.

    Raises:
        ValueError: it is not a CPU or CUDA device, is not there, or a way or size is not known.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA device here; use --device cpu")
    if unknown := set(options.ways) - set(builders()):
        raise ValueError(f"unknown ways {', '.join(sorted(unknown))}; ways are {', '.join(builders())}")
    for name in ("batch_heads", "heads", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    return device


def plan(options: AttentionBenchmark) -> list[Configuration]:
    """The configurations of a preset, the most important ones first."""

    def shape(tokens: int = TOKENS, cut: int | None = None, heads: int = options.heads, pairs=options.batch_heads):
        # Equally many tokens whatever the length, so that the same number of rows is at work.
        batch = max(1, round(pairs * TOKENS / (tokens * heads)))
        cut = round(tokens * CUT / TOKENS) if cut is None else cut
        return TwoStreamShape(tokens, cut, batch, heads, SIZE)

    dtype = options.dtype
    target = [Configuration("target", shape(), dtype, "all"), Configuration("order", shape(), dtype, "order")]
    lengths = {n: Configuration("tokens", shape(n), dtype) for n in LENGTHS}
    tuned = Configuration("autotuned", shape(), dtype, "autotuned")
    if options.preset == "tuned_flex":
        return [tuned]
    if options.preset == "quick":
        return [*target, lengths[min(LENGTHS)], lengths[max(LENGTHS)]]
    if options.preset == "targets":
        other = "fp16" if dtype == "bf16" else "bf16"
        return [
            *target,
            *(lengths[n] for n in sorted(LENGTHS, key=lambda n: -abs(n - TOKENS))),
            *(Configuration("cut", shape(cut=round(share * TOKENS)), dtype) for share in CUT_SHARES),
            *(Configuration("heads", shape(heads=heads), dtype) for heads in HEADS if heads != options.heads),
            Configuration("dtype", shape(), other),
            tuned,
        ]
    return target + [
        Configuration("product", shape(tokens, round(share * tokens), heads, pairs), name)
        for name in ("bf16", "fp16")
        for pairs in (options.batch_heads, max(1, options.batch_heads // 4))
        for heads in HEADS
        for tokens in (TOKENS, *LENGTHS)
        for share in CUT_SHARES
    ]


def no_time_for(configuration: Configuration, deadline: timing.Deadline) -> bool:
    """Whether too little time is left to begin a configuration."""
    tunes = configuration.ways == "autotuned"
    return deadline.passed() or (tunes and deadline.left() < AUTOTUNE_SECONDS)


def way_names(configuration: Configuration, flex: str) -> list[str]:
    """Names of the ways to measure; `flex` is FlexAttention's best setting so far."""
    own = [OURS + name for name in own_backends()]
    if configuration.ways == "order":
        return [name + end for name in own for end in ("_unpacked", IMAGE_ORDER)]
    if configuration.ways == "autotuned":
        return [*own, *(f"flex_{calls}_128_autotuned" for calls in ("one_call", "two_calls"))]
    if configuration.ways == "sweep":
        return [*own, "sdpa_mask", flex, "official"]
    settings = [name for name, setting in FLEX_SETTINGS.items() if not setting.autotune]
    return [*own, "sdpa_mask", "xformers_bias", *settings, "official", "official_with_masks"]


def measure(configuration: Configuration, measurement: Measurement) -> dict[str, Any]:
    """Everything about one configuration, as it stands in the record."""
    names = way_names(configuration, measurement.flex)
    if measurement.options.ways:
        names = [name for name in names if name in measurement.options.ways]
    torch._dynamo.reset()  # shapes of earlier configurations do not count towards its limit of recompilations
    ways, rows = prepare(configuration, names, measurement)
    seconds, dropped = timing.interleaved(
        ways,
        measurement.clock,
        repeats=measurement.options.repeats,
        budget=SECONDS_A_WAY,
        deadline=measurement.deadline,
        guard=guarded,
    )
    dtype = DTYPES[configuration.dtype]
    costs = roofline.costs(configuration.shape, dtype)
    bounds = roofline.bounds(costs, measurement.rates, configuration.dtype)
    for name in ways:
        if name in seconds:
            rows[name] |= {"status": "timed", **figures(seconds[name], costs, bounds)}
        else:
            failure = dropped.get(name) or Failure("not run", "time limit")
            rows[name] |= failure._asdict()
    if configuration.label == "target":
        measurement.flex = best_flex(rows, measurement.flex)
    result = {
        "label": configuration.label,
        "dtype": configuration.dtype,
        **asdict(configuration.shape),
        "targets": configuration.shape.targets,
        "visible_pairs": roofline.visible_pairs(configuration.shape),
        "costs": {phase: asdict(cost) for phase, cost in costs.items()},
        "roofline_ms": {phase: round(bound * 1e3, 4) for phase, bound in bounds.items()},
        "ways": rows,
    }
    report(result)
    return result


def prepare(
    configuration: Configuration, names: list[str], measurement: Measurement
) -> tuple[dict[str, Way], dict[str, dict[str, Any]]]:
    """The ways that give right results, and for every way a row that says what was found."""
    ways: dict[str, Way] = {}
    rows: dict[str, dict[str, Any]] = {}
    operands = random_operands(configuration.shape, DTYPES[configuration.dtype], measurement.device)
    reference, failure = guarded(lambda: yardstick(operands))
    if failure is not None:
        failure = Failure("failed", f"the float64 reference did not run: {failure.reason}")
        return {}, {name: failure._asdict() for name in names}
    for name in names:
        if measurement.deadline.passed():
            rows[name] = Failure("not run", "time limit")._asdict()
            continue
        way, failure = guarded(lambda name=name: builders()[name](operands))
        if failure is None:
            errors, failure = guarded(lambda way=way: reference.errors(way.results()))
        if failure is not None:
            rows[name] = failure._asdict()
            continue
        rows[name] = {"error_share": {part: round(share, 4) for part, share in errors.items()}}
        worst = max(errors, key=errors.get)
        if not errors[worst] <= 1:
            reason = f"{worst} errs {errors[worst]:.3g} times as much as is allowed"
            rows[name] |= Failure("wrong", reason)._asdict()
            continue
        ways[name] = way
        rows[name]["memory"], _ = guarded(lambda way=way: memory(way, measurement.device))
    return ways, rows


def memory(way: Way, device: torch.device) -> dict[str, int] | None:
    """Bytes beyond the inputs on a GPU: peaks of both passes, and what the forward pass keeps besides its outputs."""
    if device.type != "cuda":
        return None
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    outputs = way.forward()
    forward = torch.cuda.max_memory_allocated(device) - base
    saved = torch.cuda.memory_allocated(device) - base - sum(o.numel() * o.element_size() for o in outputs)
    torch.cuda.reset_peak_memory_stats(device)
    way.backward(outputs)
    backward = torch.cuda.max_memory_allocated(device) - base
    return {"forward_peak_bytes": forward, "saved_bytes": saved, "backward_peak_bytes": backward}


def figures(
    seconds: Mapping[str, list[float]], costs: Mapping[str, roofline.Cost], bounds: Mapping[str, float]
) -> dict[str, Any]:
    """Quantiles of each phase, and what follows from the medians: rates, and the share of the roofline's speed."""
    timings = {phase: records.quantiles(values) for phase, values in seconds.items()}
    median = {phase: max(quantiles["p50_ms"], 1e-6) / 1e3 for phase, quantiles in timings.items()}
    return {
        "timings": timings,
        "tflop_per_s": {phase: round(costs[phase].flop / median[phase] / 1e12, 6) for phase in median},
        "gbyte_per_s": {phase: round(costs[phase].bytes / median[phase] / 1e9, 3) for phase in median},
        "roofline_fraction": {phase: round(bounds[phase] / median[phase], 4) for phase in median},
    }


def best_flex(rows: Mapping[str, Mapping[str, Any]], default: str) -> str:
    """The setting of FlexAttention that took the least time for both passes; `default` where none was timed."""
    timed = {name: row["timings"]["both"]["p50_ms"] for name, row in rows.items() if _is_timed_flex(name, row)}
    return min(timed, key=timed.get, default=default)


def _is_timed_flex(name: str, row: Mapping[str, Any]) -> bool:
    return name in FLEX_SETTINGS and row.get("status") == "timed"


def summary(measurement: Measurement, before: dict[str, Any], stopped: str | None) -> dict[str, Any]:
    """The record's results so far."""
    options = measurement.options
    return {
        "preset": options.preset,
        "measured_on": measurement.device.type,
        "repeats": options.repeats,
        "time_limit": options.time_limit,
        "stopped": stopped,
        "state_before": before,
        "state_after": device_state(measurement.device),
        "rates": asdict(measurement.rates),
        "best_flex": measurement.flex,
        "configurations": measurement.configurations,
    }


def report(result: Mapping[str, Any]) -> None:
    """Print a configuration, a line for each way."""
    print(
        f"\n{result['label']}: N {result['tokens']}, c {result['cuts']}, B {result['batch']}, H {result['heads']}, "
        f"D {result['size']}, {result['dtype']}; roofline {result['roofline_ms']['forward']:.3f} + "
        f"{result['roofline_ms']['backward']:.3f} ms"
    )
    for name, row in result["ways"].items():
        if row["status"] != "timed":
            print(f"  {name:28} {row['status']}: {row['reason']}", flush=True)
            continue
        phases = (
            f"{phase} {row['timings'][phase]['p50_ms']:9.3f} ms {row['tflop_per_s'][phase]:7.3g} TFLOP/s "
            f"{100 * row['roofline_fraction'][phase]:5.1f} %"
            for phase in timing.PHASES
        )
        print(f"  {name:28} {'   '.join(phases)}", flush=True)
