"""Pictures of contests, from records alone: for the page, and by `python -m bench plot RECORD` for one record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.pretrain import WANTED
from bench.report_data import Entry, read
from mapet.report.picture import CYCLE, INK, QUERY, frame, save

MEASURES = {
    "images_per_second": "images per second",
    "roofline_fraction": "share of the roofline's speed",
    "tflop_per_s": "TFLOP/s",
}
"""What bars show of a phase: the first of these that the record has."""


@dataclass(frozen=True)
class Plot:
    """Pictures of records, PNG files beside them."""

    files: tyro.conf.Positional[tuple[Path, ...]]


def run(options: Plot) -> None:
    """Draw every record.

    Raises:
        ValueError: a file is no record of contests, or has nothing to draw.
    """
    for path in options.files:
        try:
            entries = list(read(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no record of contests that can be read: {error}") from error
        found = list(plots(entries))
        if not found:
            raise ValueError(f"{path} has nothing to draw: no way of a contest was timed in it")
        for name, draw in found:
            picture = path.with_name(f"{path.stem}_{name.replace(' ', '_')}.png")
            print(f"picture: {draw(picture, f'{entries[0].suite}, {entries[0].device}')}")


def plots(entries: Sequence[Entry]) -> Iterator[tuple[str, Callable[[Path, str], Path]]]:
    """(name, (path, title) -> picture) of all there is to show of one suite on one device."""
    for phase in dict.fromkeys(entry.phase for entry in entries):
        for measure, words in MEASURES.items():
            groups = {entry.name: measured(entry, measure) for entry in entries if entry.phase == phase}
            if groups := {name: values for name, values in groups.items() if values}:
                yield phase, partial(bars, groups, words, WANTED if phase == "batch" else None)
                break
    for entry in entries:
        curves = {way: row["losses"] for way, row in entry.timed.items() if "losses" in row}
        if curves:
            yield "losses", partial(lines, curves, "optimizer step", "loss, nats a token")


def measured(entry: Entry, measure: str) -> dict[str, float]:
    """Values of the ways of a contest."""
    values = {way: row.get(measure, {}).get(entry.phase) for way, row in entry.timed.items()}
    return {way: value for way, value in values.items() if value is not None}


def bars(groups: Mapping[str, Mapping[str, float]], words: str, wanted: float | None, path: Path, title: str) -> Path:
    """A bar for each way, a group for each contest; `wanted` is a line."""
    ways = list(dict.fromkeys(way for values in groups.values() for way in values))
    colours = {way: CYCLE[i % len(CYCLE)] for i, way in enumerate(ways)}
    count = sum(map(len, groups.values()))
    figure, axes = new_figure(1.5 + 0.26 * count + 0.28 * len(groups), title, words, "x")
    place, ticks = 0.0, []
    for values in groups.values():
        ticks.append(place + (len(values) - 1) / 2)
        for way, value in values.items():
            axes.barh(place, value, 0.86, color=colours[way], label=way)
            axes.annotate(number(value), (value, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
            place += 1
        place += 0.7
    axes.set_yticks(ticks, list(groups))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if wanted:
        axes.axvline(wanted, color=QUERY, label=f"wanted of ours: {number(wanted)}")
    return finished(figure, axes, path)


def lines(series: Mapping[str, Sequence[float]], x: str, y: str, path: Path, title: str) -> Path:
    """A line for each name, from 1 on."""
    figure, axes = new_figure(5.4, title, x)
    for i, (name, values) in enumerate(series.items()):
        axes.plot(range(1, 1 + len(values)), values, color=CYCLE[i % len(CYCLE)], label=name)
    axes.set_ylabel(y, color=INK)
    return finished(figure, axes, path)


def new_figure(height: float, title: str, x: str, grid: str = "both") -> tuple[Figure, Axes]:
    """A figure with one plot."""
    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
    frame(axes, grid)
    return figure, axes


def finished(figure: Figure, axes: Axes, path: Path) -> Path:
    """The legend under the plot, each name once; then the file."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    figure.legend(once.values(), once, loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=9)
    return save(figure, path, dpi=110)


def number(value: float) -> str:
    """Three digits, thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
