"""python -m bench report: a page of tables and plots from records only.

The page is Markdown with PNG files beside it: it reads on a code host, in an editor and in a terminal, needs no
template and no script, and its changes can be compared. It shows the newest record of each suite, device and contest.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import records, report_plots
from bench.report_data import Collected, Entry, collect
from mapet.report.markdown import table

NOISY = 0.1
"""Noise above which a figure is marked."""
SECTIONS = {
    "step": "One training step",
    "pretrain": "Pre-training, data included",
    "ablation": "What each switch gains",
    "curves": "Loss curves by precision",
    "kernels": "Kernels",
    "attention": "Two-stream attention and its peers",
    "peers": "Peers, as measured until November 2026",
    "kmeans": "k-means",
    "kmeans_fit": "k-means fits",
    "tokenize": "Tokenising",
}
"""Suite -> title."""
HEAD = """# Benchmarks

Every figure is of the record whose file it names; the newest record of each suite, device and contest is shown. Times
are medians; noise is (p80 - p20) / p50, and is marked (!) above 10 %. A ratio says how many times as long a way takes
as the base of its contest; there is none where the results were not checked or not equal. Figures of a CPU say so;
what is counted as its memory are the tensors that operators returned, not what an allocator holds.

The official code itself builds its masks several times more slowly than bench's official way, so what is told of
`official_with_masks`, and of pre-training with its data, is a lower bound of the ratio to the official code."""


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
    lines = [HEAD]
    for suite, title in SECTIONS.items():
        found = [entry for entry in collected.entries if entry.suite == suite]
        lines += ["", f"## {title}", ""] + ([] if found else [f"No record yet: `python -m bench {suite}`."])
        for device, group in groupby(found, key=lambda entry: entry.device):
            entries = list(group)
            lines += [f"### {device}", ""]
            for name, draw in report_plots.plots(entries):
                path = folder / re.sub(r"[^a-z0-9.]+", "_", f"{suite} {name} {device}.png".lower())
                draw(path, f"{title}, {device}")
                lines += [f"![{suite}, {name}, on {device}]({path.name})", ""]
            lines += tables(entries)
    if collected.left_out:
        lines += ["", "## Records not shown", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in collected.left_out.items()]
    return lines


def tables(entries: Sequence[Entry]) -> list[str]:
    """Every way of every contest by phase; then what was not timed and why, those with one reason together."""
    rows, untimed = [], defaultdict(list)
    for entry in entries:
        for way, reason in entry.untimed.items():
            untimed[reason].append(f"`{way}` of {entry.name}")
        for way, row in entry.timed.items():
            said = f"`{way}`" + (f" ({row['another_task']})" if "another_task" in row else "")
            for phase in row["timings"] or [""]:
                rows.append((entry.name, said, phase, *cells(row, phase), f"`{entry.record}`"))
    head = ("contest", "way", "phase", "ms", "noise", "images/s", "% of roofline", "peak MiB", "ratio", "record")
    lines = table(head, rows) if rows else []
    if untimed:
        lines += ["", "Not timed:", ""]
    for reason, ways in untimed.items():
        few = ways if len(ways) <= 3 else [*ways[:2], f"{len(ways) - 2} more"]
        lines.append(f"- {'; '.join(few)}: {reason}")
    return [*lines, ""]


def cells(row: Mapping[str, Any], phase: str) -> list[str]:
    """Milliseconds, noise, images per second, share of the roofline, peak memory, ratio; empty what is not known."""
    timing = row["timings"].get(phase, {})
    noise = timing.get("noise", 0.0)

    def cell(value: float | None, words: Callable[[float], str]) -> str:
        return "" if value is None else words(value)

    return [
        cell(timing.get("p50_ms"), "{:.4g}".format),
        cell(timing.get("noise"), lambda value: f"{100 * value:.0f} %{' (!)' if noise > NOISY else ''}"),
        cell(row.get("images_per_second", {}).get(phase), report_plots.number),
        cell(row.get("roofline_fraction", {}).get(phase), lambda share: f"{100 * share:.1f}"),
        cell((row.get("memory") or {}).get("peak_bytes"), lambda size: f"{size / 2**20:.0f}"),
        cell(row.get("times_as_long", {}).get(phase), "{:.2f}".format),
    ]
