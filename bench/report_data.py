"""What the records in a folder say, in one form whatever suite and version wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CURVES = "curves"
HARVEST = ("harvest", *(f"harvest_{kind}" for kind in ("attention", "step", "kmeans", "memory", "device")))
NOT_SHOWN = ("aot", "tune", "random_shapes", "kmeans_fit", "fuzz", *HARVEST, CURVES)
"""Suites whose records are no contests of ways in time, or have a page of their own (bench/harvest_report.py); they are
listed, but for curves, which have a section."""


@dataclass(frozen=True)
class Entry:
    """A contest of a record.

    Attributes:
        suite, name: of the contest.
        device: what was measured, for a reader; a CPU is called one.
        record: file name.
        time: when, ISO 8601.
        contest: sizes, `costs` and `ways` as bench.contest writes them.
        rates: of the device, as bench.roofline measures them, or None.
    """

    suite: str
    name: str
    device: str
    record: str
    time: str
    contest: Mapping[str, Any]
    rates: Mapping[str, Any] | None = None

    @property
    def timed(self) -> dict[str, Mapping[str, Any]]:
        """Rows of the ways that were timed."""
        return {name: row for name, row in self.contest["ways"].items() if row.get("status") == "timed"}

    @property
    def untimed(self) -> dict[str, str]:
        """Why the others were not."""
        rows = self.contest["ways"].items()
        return {name: f"{row['status']}: {row['reason']}" for name, row in rows if row.get("status") != "timed"}


@dataclass(frozen=True)
class Collected:
    """Entries of a folder, the newest of each suite, device and contest; and files left out, with the reason.

    curves: file -> the newest record of loss curves on a CPU, and on a GPU.
    """

    entries: list[Entry]
    left_out: dict[str, str]
    curves: dict[Path, dict[str, Any]]

    def of(self, *suites: str) -> list[Entry]:
        """Entries of these suites."""
        return [entry for entry in self.entries if entry.suite in suites]


def collect(folder: Path) -> Collected:
    """Read every record; one that cannot be read is left out by name.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of records")
    newest: dict[tuple[str, str, str], Entry] = {}
    left_out, curves = {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            entries = list(read(path))
            curves |= curves_of(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            left_out[path.name] = f"not understood: {type(error).__name__}: {error}"
            continue
        if not entries and path not in curves:
            left_out[path.name] = "no contest of ways"
        for entry in entries:
            key = entry.suite, entry.device, entry.name
            if key not in newest or newest[key].time <= entry.time:
                newest[key] = entry
    latest = {record["device_type"]: path for path, record in sorted(curves.items(), key=lambda item: item[1]["time"])}
    return Collected(sorted(newest.values(), key=order), left_out, {path: curves[path] for path in latest.values()})


def order(entry: Entry) -> tuple[Any, ...]:
    """GPUs before CPUs; numbers in a name by size."""
    parts = re.split(r"(\d+)", entry.name)
    name = [(int(part), "") if part.isdigit() else (0, part) for part in parts]
    return entry.suite, entry.device.startswith("CPU"), entry.device, name


def read(path: Path) -> Iterator[Entry]:
    """The contests of a record."""
    record = json.loads(path.read_text())
    suite, device, time = record["suite"], device_of(record), str(record["time"])
    if suite in NOT_SHOWN:
        return
    for contest in contests_of(suite, record):
        checked(contest)
        yield Entry(suite, str(contest["name"]), device, path.name, time, contest, record.get("rates"))


def curves_of(path: Path) -> dict[Path, dict[str, Any]]:
    """The record under its path, if it is one of loss curves."""
    record = json.loads(path.read_text())
    if record["suite"] != CURVES:
        return {}
    _ = record["curves"], record["tolerance"], record["largest_difference"], record["device_type"]
    return {path: record}


def device_of(record: Mapping[str, Any]) -> str:
    """A GPU by its name, a CPU by its name and threads. Early records of steps say which only in their command."""
    command = str(record.get("command", ""))
    on_gpu = record.get("measured_on", record.get("device_type")) == "cuda" or "--device cuda" in command
    if on_gpu:
        return str(record["device"])
    threads = record.get("threads", "?")
    return f"CPU, {record['device']}, {threads} thread{'' if threads == 1 else 's'}"


def contests_of(suite: str, record: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The contests of a record; those of earlier formats are brought into today's."""
    if "contests" in record:
        return record["contests"]
    if suite == "attention":
        return [
            {**c, "name": attention_name(c), "phases": ["forward", "backward", "both"]}
            for c in record["configurations"]
        ]
    if suite == "step":
        return [early_step(record)]
    if suite == "kmeans":
        return [early_kmeans(size, record) for size in record["sizes"]]
    if suite == "tokenize":
        return [early_tokenize(record)]
    raise ValueError(f"unknown suite {suite!r}")


def checked(contest: Mapping[str, Any]) -> None:
    """KeyError or TypeError where a timed way lacks what tables and plots read."""
    for row in contest["ways"].values():
        if row.get("status") == "timed":
            for timing in row["timings"].values():
                _ = timing["p20_ms"] + timing["p50_ms"] + timing["p80_ms"]
        else:
            _ = row["status"], row["reason"]


def attention_name(c: Mapping[str, Any]) -> str:
    """Tells one configuration of the attention suite from another."""
    return f"{c['label']} N {c['tokens']} c {c['cuts']} B {c['batch']} H {c['heads']} {c['dtype']}"


def early_step(record: Mapping[str, Any]) -> dict[str, Any]:
    """The step suite until it had contests: ours, compiled or not, and the official way."""
    ours = "ours_compiled" if record.get("compile") else "ours"
    timings = {ours if name == "ours" else name: timing for name, timing in record["timings"].items()}
    base = timings[ours]["p50_ms"]
    ways = {}
    for name, timing in timings.items():
        speed = record["batch"] / timing["p50_ms"] * 1e3
        ways[name] = {"status": "timed", "timings": {"step": timing}, "images_per_second": {"step": round(speed, 2)}}
        if name != ours:
            ways[name]["times_as_long"] = {"step": round(timing["p50_ms"] / base, 4)}
    compiled = " compiled" if record.get("compile") else ""
    return {
        "name": f"{record['model']} {record['dtype']} batch {record['batch']}{compiled}", "model": record["model"],
        "batch": record["batch"], "dtype": record["dtype"], "cut": record["cut"], "tokens": 197, "image_size": 224,
        "patch_size": 16, "phases": ["step"], "base": ours, "ways": ways,
    }  # fmt: skip


def early_kmeans(size: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A size of `python -m bench kmeans`."""
    base = size["ways"]["exact"]["timing"]["p50_ms"]
    ways: dict[str, dict[str, Any]] = {
        name: {
            "status": "timed", "timings": {"assign": way["timing"]}, "tflop_per_s": {"assign": way["tflops"]},
            "equal_ids": way["equal_ids"],
        }
        for name, way in size["ways"].items()
    }  # fmt: skip
    for name, way in ways.items():
        if name != "exact":
            way["times_as_long"] = {"assign": round(way["timings"]["assign"]["p50_ms"] / base, 4)}
    ways |= {name: {"status": "unavailable", "reason": reason} for name, reason in size["skipped"].items()}
    name = f"D {size['features']} K {size['clusters']} n {record['rows']} {record['dtype']}"
    return {"name": name, "dtype": record["dtype"], "phases": ["assign"], "base": "exact", "ways": ways}


def early_tokenize(record: Mapping[str, Any]) -> dict[str, Any]:
    """`python -m bench tokenize`: one run, no quantiles."""
    row = {
        "status": "timed", "timings": {}, "images_per_second": {"files_to_cache": record["images_per_second"]},
        "bottleneck": record["bottleneck"],
    }  # fmt: skip
    name = f"kclip {record['precision']} {record['images']} images, by stage"
    return {"name": name, "dtype": record["precision"], "phases": [], "base": "", "ways": {"pipeline": row}}


def ratio(row: Mapping[str, Any], phase: str) -> float | None:
    """How many times as long as the base a way takes, where the record says so."""
    return (row.get("times_as_long") or {}).get(phase)


def noise(timing: Mapping[str, float]) -> float:
    """(p80 - p20) / p50."""
    return (timing["p80_ms"] - timing["p20_ms"]) / timing["p50_ms"] if timing["p50_ms"] else 0.0
