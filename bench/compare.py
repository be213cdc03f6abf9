"""python -m bench compare OLD NEW: what became slower or faster between two records, beyond their noise."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

NAMING = ("name", "label", "tokens", "cuts", "heads", "dtype", "features", "clusters")
"""Fields that tell one entry of a list from another."""
SAME_MACHINE = ("suite", "device", "threads")


@dataclass(frozen=True)
class Compare:
    """What became slower or faster between two records of one suite.

    Attributes:
        least: relative change that counts, where the ranges from p20 to p80 do not overlap either.
    """

    old: tyro.conf.Positional[Path]
    new: tyro.conf.Positional[Path]
    least: float = 0.03


class Change(NamedTuple):
    """One timing in both records; `ratio` is new over old at the median."""

    name: str
    old: float
    new: float
    ratio: float
    verdict: str


def run(options: Compare) -> None:
    """Print all timings that both records have; exit code 1 if one became slower.

    Raises:
        ValueError: a file is no record, or the two have nothing in common.
    """
    old, new = read(options.old), read(options.new)
    for field in SAME_MACHINE:
        if old.get(field) != new.get(field):
            print(f"note: {field} was {old.get(field)}, is {new.get(field)}")
    after = dict(timings(new))
    changes = [judge(name, before, after[name], options.least) for name, before in timings(old) if name in after]
    if not changes:
        raise ValueError(f"{options.old} and {options.new} have no timing in common")
    width = max(len(change.name) for change in changes)
    for name, before, now, ratio, verdict in changes:
        print(f"{name:{width}} {before:10.3f} -> {now:10.3f} ms  x{ratio:.3f}  {verdict}")
    if any(change.verdict == "slower" for change in changes):
        sys.exit(1)


def read(path: Path) -> dict[str, Any]:
    """A record of any suite.

    Raises:
        ValueError: the file is something else.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no record: {error}") from error
    if not isinstance(record, dict) or "suite" not in record:
        raise ValueError(f"{path} is no record of python -m bench")
    return record


def judge(name: str, old: dict[str, float], new: dict[str, float], least: float) -> Change:
    """slower or faster where the ranges from p20 to p80 are apart and the medians differ by `least`; else same."""
    ratio = new["p50_ms"] / old["p50_ms"] if old["p50_ms"] else float("inf")
    verdict = "same"
    if new["p20_ms"] > old["p80_ms"] and ratio > 1 + least:
        verdict = "slower"
    elif new["p80_ms"] < old["p20_ms"] and ratio < 1 / (1 + least):
        verdict = "faster"
    return Change(name, old["p50_ms"], new["p50_ms"], ratio, verdict)


def timings(node: Any, name: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """Quantiles anywhere in a record, by the path to them."""
    if isinstance(node, list):
        for item in node:
            if isinstance(item, dict):
                said = " ".join(f"{key} {item[key]}" for key in NAMING if key in item)
                yield from timings(item, f"{name} [{said}]".strip())
    elif isinstance(node, dict):
        if {"p20_ms", "p50_ms", "p80_ms"} <= node.keys():
            yield name, node
            return
        for key, value in node.items():
            if isinstance(value, dict | list):
                yield from timings(value, f"{name} {key}".strip())
