"""python -m bench report: a page of tables and plots from records only.

The page is Markdown with PNG files beside it: it reads on a code host, in an editor and in a terminal, needs no
template and no script, and its changes can be compared. It shows the newest record of each suite, device and contest.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import ablation, curves, records, report_plots
from bench.pretrain import WANTED
from bench.report_data import Collected, Entry, collect, device_of, noise, ratio
from bench.report_plots import MIB, Point, Reader
from mapet.report.markdown import table

SHORT = {"batch": "batch", "image_size": "image", "patch_size": "patch"}
"""Sizes in the name of a line."""
NOISY = 0.1
"""Noise above which a figure is marked."""


@dataclass(frozen=True)
class Report:
    """A page of tables and plots from records.

    Attributes:
        results: folder with the records.
        output: folder for the page, report.md, and its pictures.
    """

    results: Path = records.RESULTS
    output: Path = Path("runs/bench_report")


def run(options: Report) -> Path:
    """Write the page and return its path.

    Raises:
        ValueError: there is no such folder of records.
    """
    collected = collect(options.results)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "report.md"
    path.write_text("\n".join(page(collected, options.output)) + "\n")
    print(f"report: {path}")
    return path


def page(collected: Collected, folder: Path) -> list[str]:
    """The lines of the page; draws its pictures into the folder."""
    sections: list[tuple[str, str, Callable[[Collected, Path], list[str]]]] = [
        ("One training step", "run --suite step", step_section),
        ("Pre-training, data included", "run --suite pretrain", pretrain_section),
        ("What each switch gains", "ablation", ablation_section),
        ("Loss curves by precision", "curves", curves_section),
        ("Roofline of the kernels", "run --suite kernels", roofline_section),
        ("Peers", "run --suite peers", peers_section),
        ("Memory against the micro-batch", "run --suite step --batch 8 16 32", memory_section),
        ("Scaling with the number of tokens", "run --suite step --patch-size 32 16 8", tokens_section),
        ("Scaling with the size of images", "run --suite step --image-size 112 224 448", image_section),
        ("k-means", "run --suite kmeans", table_section("kmeans")),
        ("Tokenising", "run --suite tokenize", table_section("tokenize")),
    ]
    lines = [
        "# Benchmarks",
        "",
        "Every figure is of the record whose file it names; the newest record of each suite, device and contest is "
        "shown. Times are medians; noise is (p80 - p20) / p50, and is marked (!) above 10 %. A ratio says how many "
        "times as long a way takes as the base of its contest; there is none where the results were not checked or not "
        "equal. Figures of a CPU say so.",
        "",
    ]
    for title, command, section in sections:
        lines += [
            f"## {title}",
            "",
            *(section(collected, folder) or [f"No record yet: `python -m bench {command}`."]),
            "",
        ]
    if collected.left_out:
        lines += ["## Records not shown", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in collected.left_out.items()]
    return lines


def step_section(collected: Collected, folder: Path) -> list[str]:
    """Throughput of the step."""
    return throughput(collected.of("step"), "step", folder, "step")


def pretrain_section(collected: Collected, folder: Path) -> list[str]:
    """Throughput with data, then the loaders alone."""
    entries = collected.of("pretrain")
    steps = [entry for entry in entries if "step" in entry.contest["phases"]]
    loaders = [entry for entry in entries if "batch" in entry.contest["phases"]]
    lines = throughput(steps, "step", folder, "pretrain")
    if loaders:
        lines += ["", f"The loaders alone, on the CPU; {WANTED:,} images per second are wanted of ours.", ""]
        lines += throughput(loaders, "batch", folder, "loader", WANTED)
    return lines


def throughput(entries: Sequence[Entry], phase: str, folder: Path, name: str, wanted: float | None = None) -> list[str]:
    """For each device a plot and a table."""
    lines = []
    for device, group in by_device(entries).items():
        lines += [f"### {device}", ""]
        if any(phase in row.get("images_per_second", {}) for entry in group for row in entry.timed.values()):
            picture = report_plots.bars(folder / f"{name}_{slug(device)}.png", group, phase, device, wanted)
            lines += [f"![{name} on {device}]({picture.name})", ""]
        lines += [*device_table(group), ""]
    return lines[:-1]


def table_section(suite: str) -> Callable[[Collected, Path], list[str]]:
    """A section that is a table."""
    return lambda collected, folder: entry_table(collected.of(suite))


def peers_section(collected: Collected, folder: Path) -> list[str]:
    """Attention and step beside what others use."""
    targets = [entry for entry in collected.of("attention") if entry.contest["label"] == "target"]
    return entry_table([*collected.of("peers"), *targets], phases=("both", "step"))


def ablation_section(collected: Collected, folder: Path) -> list[str]:
    """A table for each device, model and dtype, and its picture."""
    lines = []
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in collected.of("ablation"):
        groups[entry.device, entry.name.removesuffix(" with data")].append(entry)
    for (device, name), entries in groups.items():
        found = sorted((g for e in entries for g in ablation.gains(e.contest)), key=lambda g: -g.gain)
        lines += [f"### {name}, {device}", ""]
        if found:
            picture = folder / f"ablation_{slug(f'{name} {device}')}.png"
            report_plots.gains(picture, found, f"{name}, {device}")
            lines += [f"![switches]({picture.name})", ""]
        lines += [*ablation.as_markdown([entry.contest for entry in entries]), ""]
        lines += [f"Records: {', '.join(sorted({f'`{entry.record}`' for entry in entries}))}.", ""]
    return lines


def curves_section(collected: Collected, folder: Path) -> list[str]:
    """A picture and a table for each record."""
    lines = []
    for path, record in collected.curves.items():
        picture = curves.draw(path, folder / f"{path.stem}.png")
        rows = [
            (
                name,
                f"{100 * away:.3f} %",
                f"{100 * record['tolerance']:.3f} %" if name != curves.OTHER_SEED else "",
                f"`{path.name}`",
            )
            for name, away in record["largest_difference"].items()
        ]
        head = ("run", "largest difference from fp32", "tolerance", "record")
        lines += [f"### {device_of(record)}", "", f"![loss curves]({picture.name})", "", *table(head, rows), ""]
    return lines[:-1]


def roofline_section(collected: Collected, folder: Path) -> list[str]:
    """A plot for each device and dtype, and a table of shares of the roofline."""
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in collected.of("kernels", "attention"):
        first = entry.suite == "kernels" or entry.contest["label"] == "target"
        if first and entry.rates and entry.contest["dtype"] in entry.rates["flop_per_second"] and entry.timed:
            groups[entry.device, entry.contest["dtype"]].append(entry)
    lines = []
    head = ("op and shape", "way", "forward, % of roofline", "backward", "both, ratio", "record")
    for (device, dtype), entries in groups.items():
        picture = folder / f"roofline_{slug(f'{device} {dtype}')}.png"
        report_plots.roofline(picture, entries, f"Kernels on {device}, {dtype}")
        rows = [
            (
                entry.name,
                f"`{way}`",
                share(row, "forward"),
                share(row, "backward"),
                times(row, "both"),
                f"`{entry.record}`",
            )
            for entry in entries
            for way, row in entry.timed.items()
        ]
        lines += [f"### {device}, {dtype}", "", f"![roofline]({picture.name})", "", *table(head, rows), ""]
    return lines[:-1]


def share(row: Mapping[str, Any], phase: str) -> str:
    """Per cent of the roofline's speed."""
    value = row.get("roofline_fraction", {}).get(phase)
    return "" if value is None else f"{100 * value:.1f}"


def memory_section(collected: Collected, folder: Path) -> list[str]:
    """Peak memory of a way's step against its micro-batch."""

    def point(entry: Entry, row: Mapping[str, Any]) -> Point | None:
        peak = (row.get("memory") or {}).get("peak_bytes")
        at = row.get("micro_batch", entry.contest.get("batch"))
        return None if peak is None or at is None else (at, *(peak / MIB,) * 3)

    lines = swept(
        collected.of("step"), folder, point, ("memory", "micro-batch", "peak, MiB"), same=("image_size", "patch_size")
    )
    told = "On a CPU, what is counted are the tensors that operators returned, not what an allocator holds."
    return [told, "", *lines] if lines else []


def tokens_section(collected: Collected, folder: Path) -> list[str]:
    """Milliseconds per image of the step, and time per visible pair of attention, against N."""

    def step_point(entry: Entry, row: Mapping[str, Any]) -> Point | None:
        return spread(row, "step", entry.contest["tokens"], 1 / entry.contest["batch"])

    def pair_point(entry: Entry, row: Mapping[str, Any]) -> Point | None:
        contest = entry.contest
        if entry.suite == "attention":
            swept_, tokens, size = contest["label"] in ("target", "tokens"), contest["tokens"], contest["size"]
        else:
            swept_ = contest["op"] == "two_stream_attention" and contest["label"] == "block"
            tokens, size = contest["shape"].get("tokens"), contest["shape"].get("size")
        if not swept_:
            return None
        pairs = contest["costs"]["forward"]["flop"] / (4 * size)  # a visible pair is two products of `size` terms
        return spread(row, "both", tokens, 1e6 / pairs)

    lines = swept(
        collected.of("step"),
        folder,
        step_point,
        ("step_tokens", "tokens, N", "ms per image"),
        same=("image_size", "batch"),
    )
    for suite in ("attention", "kernels"):
        words_ = f"{suite}_tokens", "tokens, N", "ns per visible pair"
        more = swept(collected.of(suite), folder, pair_point, words_, log_y=True)
        lines += ([""] if lines and more else []) + more
    return lines


def image_section(collected: Collected, folder: Path) -> list[str]:
    """Milliseconds per image of the step against the side of an image."""

    def point(entry: Entry, row: Mapping[str, Any]) -> Point | None:
        return spread(row, "step", entry.contest["image_size"], 1 / entry.contest["batch"])

    return swept(
        collected.of("step"), folder, point, ("step_images", "side of an image, pixels", "ms per image"),
        same=("patch_size", "batch"),
    )  # fmt: skip


def spread(row: Mapping[str, Any], phase: str, at: float, factor: float) -> Point | None:
    """(at, p20, p50, p80) times the factor."""
    timing = row["timings"].get(phase)
    return timing and (at, *(timing[f"p{p}_ms"] * factor for p in (20, 50, 80)))


def swept(
    entries: Sequence[Entry],
    folder: Path,
    point: Reader,
    words: tuple[str, str, str],
    *,
    same: Sequence[str] = (),
    log_y: bool = False,
) -> list[str]:
    """A plot and a table for each device of what a sweep measured; a single point is no sweep.

    Args:
        point: what a way has to show.
        words: name of the picture, of x and of y.
        same: fields that must not vary along a line, besides model, dtype and way.
    """
    name, x, y = words
    lines: list[str] = []
    for device, group in by_device(entries).items():
        found: dict[str, dict[float, tuple[Point, str]]] = defaultdict(dict)
        for entry in sorted(group, key=lambda entry: entry.time):  # so that the newest is kept at each place
            for way, row in entry.timed.items():
                if (at := point(entry, row)) is not None:
                    fixed = [str(entry.contest[field]) for field in ("model", "dtype") if field in entry.contest]
                    fixed += [f"{SHORT[field]} {entry.contest[field]}" for field in same]
                    line = ", ".join([way.replace("_", " "), " ".join(fixed)])
                    found[line][at[0]] = at, entry.record
        found = {line: dict(sorted(points.items())) for line, points in sorted(found.items()) if len(points) > 1}
        if not found:
            continue
        picture = folder / f"{name}_{slug(device)}.png"
        series = {line: [at for at, _ in points.values()] for line, points in found.items()}
        report_plots.lines(picture, series, device, x, y, log_y=log_y)
        rows = [
            (line, f"{at[0]:g}", report_plots.number(at[2]), f"`{record}`")
            for line, points in found.items()
            for at, record in points.values()
        ]
        lines += [f"![{y} against {x} on {device}]({picture.name})", "", *table(("way", x, y, "record"), rows), ""]
    return lines[:-1]


def entry_table(entries: Sequence[Entry], phases: Sequence[str] = ()) -> list[str]:
    """For each device a table."""
    lines = []
    for device, group in by_device(entries).items():
        lines += [f"### {device}", "", *device_table(group, phases), ""]
    return lines[:-1]


def device_table(entries: Sequence[Entry], phases: Sequence[str] = ()) -> list[str]:
    """Every way of every contest: time, noise, rates and ratio, by phase; then what was not timed, and why."""
    rows, untimed = [], {}
    for entry in entries:
        untimed |= {f"`{way}` of {entry.name}": why for way, why in entry.untimed.items()}
        for way, row in entry.timed.items():
            shown = row["timings"] or row.get("images_per_second", {})
            for phase in [phase for phase in shown if not phases or phase in phases]:
                rows.append((entry.name, words(way, row), phase, *cells(row, phase), f"`{entry.record}`"))
    head = ("contest", "way", "phase", "ms", "noise", "images/s", "ratio", "record")
    return (table(head, rows) if rows else []) + not_timed(untimed)


def not_timed(reasons: Mapping[str, str]) -> list[str]:
    """A list of ways that were not timed, those with one reason together."""
    if not reasons:
        return []
    by_reason: dict[str, list[str]] = defaultdict(list)
    for way, reason in reasons.items():
        by_reason[reason].append(way)
    few = {
        reason: ways if len(ways) <= 3 else [*ways[:2], f"{len(ways) - 2} more"] for reason, ways in by_reason.items()
    }
    return ["", "Not timed:", "", *(f"- {'; '.join(ways)}: {reason}" for reason, ways in few.items())]


def words(way: str, row: Mapping[str, Any]) -> str:
    """A way, with what it does instead where that is another task."""
    return f"`{way}`" + (f" ({row['another_task']})" if "another_task" in row else "")


def cells(row: Mapping[str, Any], phase: str) -> tuple[str, str, str, str]:
    """Milliseconds, noise, images per second, ratio."""
    timing = row["timings"].get(phase)
    speed = row.get("images_per_second", {}).get(phase)
    spread_ = noise(timing) if timing else 0.0
    return (
        f"{timing['p50_ms']:.4g}" if timing else "",
        f"{100 * spread_:.0f} %{' (!)' if spread_ > NOISY else ''}" if timing else "",
        "" if speed is None else report_plots.number(speed),
        times(row, phase),
    )


def times(row: Mapping[str, Any], phase: str) -> str:
    """The ratio of a phase, or nothing."""
    value = ratio(row, phase)
    return "" if value is None else f"{value:.2f}"


def by_device(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by device, in their order."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.device].append(entry)
    return groups


def slug(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
