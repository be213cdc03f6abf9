"""python -m bench plot FILE...: pictures of attention records, drawn from the records alone, a PNG beside each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, NullLocator

from bench.report_plots import style
from bench.timing import PHASES
from mapet.report.picture import CONTEXT, FAINT, INK, MASK, QUERY, TARGET, save

OURS = "ours_"
NAMES = {
    "ours_triton": "ours, Triton",
    "ours_cuda": "ours, CUDA C++",
    "ours_flash": "ours, composed flash",
    "ours_sdpa": "ours, composed SDPA",
    "ours_reference": "ours, plain torch",
    "sdpa_mask": "SDPA, boolean mask",
    "xformers_bias": "xformers, dense bias",
    "flex": "FlexAttention, block mask",
    "flex_tuned": "FlexAttention, tuned tiles",
    "official": "official way",
    "official_with_masks": "official way, masks built",
}
"""Ways in the order they are drawn, with their names in a picture; `flex` is FlexAttention's best setting, `flex_tuned`
the better one of those with tuned tiles, which have a configuration of their own."""
COLOURS = dict(
    zip(
        NAMES,
        (CONTEXT, "#16324a", "#5aa9d6", "#6c5b9e", FAINT, MASK, "#8a5a00", TARGET, "#1d6b51", QUERY, "#e3a0bd"),
        strict=True,
    )
)
SHADES = {"forward": CONTEXT, "backward": "#9cc4e4", "both": INK}
WANTED = {"sdpa_mask": 5.0, "flex": 2.5, "flex_tuned": 2.5, "official": 10.0}
"""How many times as fast as a peer the forward pass is meant to be, on a GPU."""
TIME_UNITS = {"cuda": (1e9, "picoseconds"), "cpu": (1e6, "nanoseconds")}
"""Of a time per visible pair: units in a millisecond, and their name."""
RATE_UNITS = {"cuda": (1.0, "TFLOP/s"), "cpu": (1e3, "GFLOP/s")}
"""Of a rate: units in a TFLOP/s, and their name."""


@dataclass(frozen=True)
class Plot:
    """Records to draw.

    Attributes:
        files: records of `python -m bench attention`.
    """

    files: tuple[Path, ...]


def run(options: Plot) -> None:
    """Draw every file.

    Raises:
        ValueError: there is no file, or one is no attention record, or holds no timing.
    """
    if not options.files:
        raise ValueError("plot needs the paths of records of `python -m bench attention`")
    for path in options.files:
        print(f"picture: {draw(path)}")


def draw(path: Path) -> Path:
    """Draw one record; returns the picture's path, the record's with .png.

    Raises:
        ValueError: the file is no attention record, or holds no timing.
    """
    record = read(path)
    configurations = [c for c in record["configurations"] if timed(c)]
    if not configurations:
        raise ValueError(f"{path} has no timing to draw: no way was timed in any configuration")
    target = configurations[0]
    lengths = [c for c in configurations if c["label"] in ("target", "tokens")] or [target]
    cuts = [c for c in configurations if c["label"] in ("target", "cut")]
    rows = 3 if len(cuts) > 1 else 2
    figure = Figure(figsize=(14, 4.4 * rows), layout="constrained")
    grid = figure.subplots(rows, 2)
    for axes, phase in zip(grid[0], ("forward", "backward"), strict=True):
        draw_lengths(axes, record, lengths, phase)
        if rows == 3:
            draw_cuts(grid[1][PHASES.index(phase)], record, cuts, phase)
    draw_speed(grid[-1][0], record, target)
    draw_roofline(grid[-1][1], record, target)
    lines = {text: line for axes in grid[0] for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, labelcolor=INK)
    figure.suptitle(title(record, target), x=0.01, ha="left", fontsize=12.5, color=INK, fontweight="bold")
    return save(figure, path.with_suffix(".png"), dpi=120)


def read(path: Path) -> dict[str, Any]:
    """An attention record.

    Raises:
        ValueError: the file is something else.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no record: {error}") from error
    if not isinstance(record, dict) or record.get("suite") != "attention":
        raise ValueError(f"{path} is no record of `python -m bench attention`")
    return record


def timed(configuration: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rows of the ways that were timed."""
    return {name: row for name, row in configuration["ways"].items() if row["status"] == "timed"}


def shown(record: Mapping[str, Any], configuration: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Timed rows by the names of NAMES, in its order: FlexAttention with its best setting only."""
    rows = timed(configuration)
    tuned = [row for name, row in rows.items() if name.endswith("_autotuned")]
    rows["flex"] = rows.get(record["best_flex"])
    rows["flex_tuned"] = min(tuned, key=lambda row: row["timings"]["both"]["p50_ms"], default=None)
    return {name: rows[name] for name in NAMES if rows.get(name) is not None}


def title(record: Mapping[str, Any], target: Mapping[str, Any]) -> str:
    """Device, dtype, sizes, versions and commit."""
    versions = record["versions"]
    return (
        f"Two-stream attention on {record['state_before']['name']}: {target['dtype']}, head size {target['size']}, "
        f"B x H = {target['batch'] * target['heads']} at N = {target['tokens']}\n"
        f"torch {versions['torch']}, Triton {versions['triton']}, {record['time'][:10]}, commit {record['commit'][:7]}"
    )


def draw_lengths(
    axes: Axes, record: Mapping[str, Any], configurations: Sequence[Mapping[str, Any]], phase: str
) -> None:
    """Time per visible pair against N, a line for each way, with the band from p20 to p80."""
    ordered = sorted(configurations, key=lambda c: c["tokens"])
    factor, unit = TIME_UNITS[record["measured_on"]]
    for name in NAMES:
        points = [(c, shown(record, c)[name]["timings"][phase]) for c in ordered if name in shown(record, c)]
        if not points:
            continue
        tokens = [c["tokens"] for c, _ in points]
        low, middle, high = (
            [t[f"{p}_ms"] * factor / c["visible_pairs"] for c, t in points] for p in ("p20", "p50", "p80")
        )
        _line(axes, tokens, middle, name)
        axes.fill_between(tokens, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
    bound = [c["roofline_ms"][phase] * factor / c["visible_pairs"] for c in ordered]
    axes.plot([c["tokens"] for c in ordered], bound, color=INK, linestyle=":", label="roofline of this device")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    _log_x(axes, [c["tokens"] for c in ordered])
    style(axes, f"{phase.capitalize()}: time per visible pair", "tokens of an image, N (log)", f"{unit} (log)")


def draw_cuts(axes: Axes, record: Mapping[str, Any], configurations: Sequence[Mapping[str, Any]], phase: str) -> None:
    """Operations a second on visible pairs, against the cut."""
    ordered = sorted(configurations, key=lambda c: c["cuts"])
    factor, unit = RATE_UNITS[record["measured_on"]]
    for name in NAMES:
        points = [(c["cuts"], shown(record, c)[name]["tflop_per_s"]) for c in ordered if name in shown(record, c)]
        if points:
            _line(axes, [cut for cut, _ in points], [factor * rates[phase] for _, rates in points], name)
    axes.set_ylim(bottom=0)
    tokens = ordered[0]["tokens"]
    style(axes, f"{phase.capitalize()}: rate on visible pairs, N = {tokens}", "cut c, in tokens", unit)


def draw_speed(axes: Axes, record: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """How many times as long each peer takes as the fastest of ours."""
    own = {name: row for name, row in shown(record, target).items() if name.startswith(OURS)}
    best = min(own, key=lambda name: own[name]["timings"]["both"]["p50_ms"], default=None)
    others = list(times_as_long(record, target, best, "both")) if own else []
    if not others:
        axes.text(0.5, 0.5, "no peer was timed" if own else "none of ours was timed", ha="center", color=INK)
        axes.set_axis_off()
        return
    values = {phase: list(times_as_long(record, target, best, phase).values()) for phase in PHASES}
    _bars(axes, [NAMES[name] for name in others], values, "{:.2f}", start=1.0)
    axes.axvline(1, color=INK, linewidth=1)
    if record["measured_on"] == "cuda":
        places = [(i, WANTED[name]) for i, name in enumerate(others) if name in WANTED]
        for i, wanted in places:
            axes.plot([wanted, wanted], [i - 0.4, i + 0.4], color=QUERY, linewidth=2)
    flat = [value for lengths in values.values() for value in lengths]
    _log_x(axes, (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))
    axes.set_xlim(min(0.5, min(flat) / 1.6), max(2.0, max(flat) * 1.6))
    wanted = "; red: wanted, forward" if record["measured_on"] == "cuda" else ""
    style(axes, f"Time of peers over that of '{NAMES[best]}'", f"times as long (log){wanted}", None, along="x")


def times_as_long(record: Mapping[str, Any], target: Mapping[str, Any], best: str, phase: str) -> dict[str, float]:
    """Times of the peers, by the names of NAMES, over that of our way `best` in the same configuration."""
    ratios: dict[str, float] = {}
    for configuration in (target, *(c for c in record["configurations"] if c["label"] == "autotuned")):
        rows = {name: row["timings"][phase]["p50_ms"] for name, row in shown(record, configuration).items()}
        if best in rows:
            ratios |= {name: ms / rows[best] for name, ms in rows.items() if not name.startswith(OURS)}
    return {name: ratios[name] for name in NAMES if name in ratios}


def draw_roofline(axes: Axes, record: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Share of the roofline's speed that each way reaches."""
    rows = shown(record, target)
    values = {
        phase: [100 * row["roofline_fraction"][phase] for row in rows.values()] for phase in ("forward", "backward")
    }
    _bars(axes, [NAMES[name] for name in rows], values, "{:.1f}", start=0.0)
    axes.set_xlim(0, max(10.0, 1.15 * max(value for lengths in values.values() for value in lengths)))
    rates, (factor, unit) = record["rates"], RATE_UNITS[record["measured_on"]]
    copy, products = rates["bytes_per_second"] / 1e9, rates["flop_per_second"][target["dtype"]] / 1e12
    limits = f"copy {_three_digits(copy)} GB/s, products {_three_digits(factor * products)} {unit}"
    style(axes, f"Share of the roofline ({limits})", "% of the speed that this device allows", None, along="x")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], name: str) -> None:
    width = 2.4 if name.startswith(OURS) else 1.5
    axes.plot(x, y, marker="o", markersize=4, color=COLOURS[name], linewidth=width, label=NAMES[name])


def _bars(axes: Axes, names: Sequence[str], values: Mapping[str, Sequence[float]], words: str, *, start: float) -> None:
    """Horizontal bars from `start`, a group for each name from the top down, one bar a phase."""
    height = 0.8 / len(values)
    for i, (phase, ends) in enumerate(values.items()):
        places = np.arange(len(names)) + (i - (len(values) - 1) / 2) * height
        axes.barh(places, np.array(ends) - start, height * 0.9, left=start, color=SHADES[phase], label=phase)
        for place, end in zip(places, ends, strict=True):
            offset, side = (4, "left") if end >= start else (-4, "right")
            axes.annotate(
                words.format(end), (end, place), (offset, 0), textcoords="offset points",
                ha=side, va="center", fontsize=8.5, color=INK,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(
        frameon=False, fontsize=9, labelcolor=INK, ncols=len(values), loc="upper center", bbox_to_anchor=(0.5, -0.16)
    )


def _log_x(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain(value: float, _: int) -> str:
    return f"{value:.10g}"
