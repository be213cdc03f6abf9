"""What the records in a folder say: the newest record of each contest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.options import SUITES


@dataclass(frozen=True)
class Entry:
    """A contest of a record.

    Attributes:
        suite, name: of the contest.
        device: what was measured, for a reader; a CPU is called one.
        record: file name.
        time: when, ISO 8601.
        contest: sizes, `costs` and `ways` as bench.contest writes them.
    """

    suite: str
    name: str
    device: str
    record: str
    time: str
    contest: Mapping[str, Any]

    @property
    def phase(self) -> str:
        """The one that stands for the contest: the last, which is both passes where there are two."""
        return (self.contest["phases"] or [""])[-1]

    @property
    def timed(self) -> dict[str, Mapping[str, Any]]:
        """Rows of the ways that were timed."""
        return {name: row for name, row in self.contest["ways"].items() if row["status"] == "timed"}

    @property
    def untimed(self) -> dict[str, str]:
        """Why the others were not."""
        rows = self.contest["ways"].items()
        return {name: f"{row['status']}: {row['reason']}" for name, row in rows if row["status"] != "timed"}


@dataclass(frozen=True)
class Collected:
    """Entries of a folder, the newest of each suite, device and contest; and files left out, with the reason."""

    entries: list[Entry]
    left_out: dict[str, str]


def collect(folder: Path) -> Collected:
    """Read every record; one that cannot be read is left out by name.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of records")
    newest: dict[tuple[str, str, str], Entry] = {}
    left_out = {}
    for path in sorted(folder.glob("*.json")):
        try:
            entries = list(read(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            left_out[path.name] = f"not understood: {type(error).__name__}: {error}"
            continue
        if not entries:
            early = json.loads(path.read_text())["suite"] in SUITES
            left_out[path.name] = "of an earlier format" if early else "no contest of ways"
        for entry in entries:
            key = entry.suite, entry.device, entry.name
            if key not in newest or newest[key].time <= entry.time:
                newest[key] = entry
    return Collected(sorted(newest.values(), key=order), left_out)


def order(entry: Entry) -> tuple[Any, ...]:
    """GPUs before CPUs; numbers in a name by size."""
    parts = re.split(r"(\d+)", entry.name)
    name = [(int(part), "") if part.isdigit() else (0, part) for part in parts]
    return entry.suite, entry.device.startswith("CPU"), entry.device, name


def read(path: Path) -> Iterator[Entry]:
    """The contests of a record; none where a suite had none yet, or of a command that measures none.

    Raises:
        KeyError, TypeError: what tables and plots read is not there.
    """
    record = json.loads(path.read_text())
    suite = record["suite"]
    for contest in record.get("contests", ()) if suite in (*SUITES, "peers") else ():
        for row in contest["ways"].values():
            _ = row["status"] == "timed" or row["reason"]
            for timing in row.get("timings", {}).values():
                _ = timing["p20_ms"] + timing["p50_ms"] + timing["p80_ms"] + timing["noise"]
        threads = record["threads"]
        cpu = f"CPU, {record['device']}, {threads} thread{'' if threads == 1 else 's'}"
        device = record["device"] if record["measured_on"] == "cuda" else cpu
        yield Entry(suite, contest["name"], device, path.name, record["time"], contest)
