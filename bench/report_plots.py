"""The pictures of the benchmark page, each from entries of records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.ablation import Gain
from bench.report_data import Entry
from mapet.report.picture import CYCLE, FAINT, INK, QUERY, frame, save

WIDTH = 9.0
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
MIB = 2**20


def bars(path: Path, entries: Sequence[Entry], phase: str, title: str, wanted: float | None = None) -> Path:
    """Images per second of every way, a group for each contest; whiskers from p20 to p80; `wanted` is a line."""
    groups = [
        (entry.name, {n: r for n, r in entry.timed.items() if phase in r.get("images_per_second", {})})
        for entry in entries
    ]
    groups = [(name, rows) for name, rows in groups if rows]
    ways = list(dict.fromkeys(way for _, rows in groups for way in rows))
    colours = dict(zip(ways, repeated(CYCLE, ways), strict=True))
    count = sum(len(rows) for _, rows in groups)
    figure = Figure(figsize=(WIDTH, 1.5 + 0.26 * count + 0.28 * len(groups)), layout="constrained")
    axes = figure.subplots()
    place, ticks, longest = 0.0, [], 0.0
    for _, rows in groups:
        first = place
        for way, row in rows.items():
            speed = row["images_per_second"][phase]
            axes.barh(place, speed, 0.86, color=colours[way])
            end = speed
            if timing := row["timings"].get(phase):
                low, end = (speed * timing["p50_ms"] / timing[f"p{p}_ms"] for p in (80, 20))
                axes.plot([low, end], [place, place], color=INK, linewidth=1.2)
            longest = max(longest, end)
            axes.annotate(
                number(speed), (end, place), (5, 0), textcoords="offset points", va="center",
                fontsize=8.5, color=INK,
            )  # fmt: skip
            place += 1
        ticks.append((first + place - 1) / 2)
        place += 0.7
    axes.set_yticks(ticks, [name for name, _ in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(longest, wanted or 0.0))
    handles = [axes.barh([0], [0], color=colours[way], label=way.replace("_", " ")) for way in ways]
    if wanted:
        handles.append(axes.axvline(wanted, color=QUERY, linewidth=1.5, label=f"wanted of ours: {number(wanted)}"))
    below(figure, handles)
    style(axes, title, "images per second", None, along="x")
    return save(figure, path, dpi=110)


def roofline(path: Path, entries: Sequence[Entry], title: str) -> Path:
    """Rate against arithmetic intensity of every op and backend; the roof is what this device was measured to do."""
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    axes = figure.subplots()
    points = [point for entry in entries for point in roofline_points(entry)]
    ops, ways = (list(dict.fromkeys(point[i] for point in points)) for i in range(2))
    colours, markers = (
        dict(zip(names, repeated(kinds, names), strict=True)) for names, kinds in ((ops, CYCLE), (ways, MARKERS))
    )
    for op, way, phase, intensity, rate in points:
        axes.plot(
            intensity, rate, markers[way], color=colours[op], markersize=7, markeredgewidth=1.3,
            markerfacecolor=colours[op] if phase == "forward" else "none",
        )  # fmt: skip
    rates, dtype = entries[-1].rates, entries[-1].contest["dtype"]
    top, slope = rates["flop_per_second"][dtype] / 1e12, rates["bytes_per_second"] / 1e12
    intensities = [top / slope, *(point[3] for point in points)]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    axes.plot(x, np.minimum(top, slope * x), color=INK, linewidth=1.5)
    axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
    plain_numbers(axes.xaxis, axes.yaxis)
    handles = [Line2D([], [], color=colours[op], linewidth=5, label=op) for op in ops]
    handles += [Line2D([], [], color=INK, linestyle="", marker=markers[way], label=way) for way in ways]
    below(figure, handles)
    limits = f"copy {1e3 * slope:,.0f} GB/s, {dtype} products {1e3 * top:,.0f} GFLOP/s"
    style(axes, f"{title}\nfull: forward, hollow: backward; line: {limits}", "FLOP per byte", "TFLOP/s")
    return save(figure, path, dpi=110)


def roofline_points(entry: Entry) -> Iterator[tuple[str, str, str, float, float]]:
    """(op, way, phase, FLOP per byte, TFLOP/s) of both passes of every way."""
    op = entry.contest.get("op") or "two_stream_attention"
    for way, row in entry.timed.items():
        for phase in ("forward", "backward"):
            rate, cost = row.get("tflop_per_s", {}).get(phase), entry.contest.get("costs", {}).get(phase)
            if rate and cost and cost["bytes"]:
                yield op, way.replace("_", " "), phase, cost["flop"] / cost["bytes"], rate


def lines(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    title: str,
    x: str,
    y: str,
    *,
    log_y: bool = False,
) -> Path:
    """Lines through (x, low, middle, high), with a band from low to high."""
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    for (name, points), colour in zip(series.items(), repeated(CYCLE, list(series)), strict=True):
        at, low, middle, high = zip(*sorted(points), strict=True)
        axes.plot(at, middle, marker="o", markersize=4.5, color=colour, label=name)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    if log_y:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({point[0] for points in series.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    below(figure, axes.get_legend_handles_labels()[0], columns=2)
    style(axes, title, x, y)
    return save(figure, path, dpi=110)


def gains(path: Path, found: Sequence[Gain], title: str) -> Path:
    """How much faster the step is with each switch on; the grey line is the noise of the pair."""
    figure = Figure(figsize=(WIDTH, 1.4 + 0.36 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, gain in enumerate(found):
        axes.barh(place, 100 * gain.gain, 0.7, color=CYCLE[0] if gain.base == "on" else CYCLE[1])
        half = 50 * gain.noise
        axes.plot([100 * gain.gain - half, 100 * gain.gain + half], [place, place], color=FAINT, linewidth=2)
    axes.set_yticks(range(len(found)), [gain.switch for gain in found])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=1)
    kinds = {"on": "on in the base, turned off", "off": "off in the base, turned on"}
    handles = [
        axes.barh([0], [0], color=CYCLE[i], label=words)
        for i, (base, words) in enumerate(kinds.items())
        if any(gain.base == base for gain in found)
    ]
    below(figure, handles)
    style(axes, title, "faster with the switch on, %; grey: p20 to p80", None, along="x")
    return save(figure, path, dpi=110)


def repeated(kinds: Sequence[str], names: Sequence[str]) -> list[str]:
    """A kind for each name, from the first again where there are too few."""
    return [kinds[i % len(kinds)] for i in range(len(names))]


def plain_numbers(*axes: Axis) -> None:
    """Numbers of a logarithmic axis as people write them; on a short axis those between the decades too."""
    for axis in axes:
        low, high = axis.get_view_interval()
        formatter = FuncFormatter(lambda value, _: f"{value:.10g}")
        axis.set_major_formatter(formatter)
        axis.set_minor_formatter(formatter if high < 20 * low else NullFormatter())


def number(value: float) -> str:
    """Three digits, thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def below(figure: Figure, handles: Iterable[Any], columns: int = 4) -> None:
    """The legend under the plot."""
    handles = list(handles)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, max(1, len(handles))), frameon=False,
        labelcolor=INK, fontsize=9,
    )  # fmt: skip


def style(axes: Axes, title: str, x: str, y: str | None, along: str = "both") -> None:
    """Title, labels, a light grid."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK, fontsize=9.5)
    if y is not None:
        axes.set_ylabel(y, color=INK, fontsize=9.5)
    frame(axes, along)


Point = tuple[float, float, float, float]
Reader = Callable[[Entry, Mapping[str, Any]], Point | None]
"""(entry, row of a way) -> a point of its line, or None."""
