"""What a harvest (bench/harvest.py) brought home, read so that damage costs only itself. Standard library alone."""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

ARCHIVE = "harvest.tar.gz"
MEMBER = re.compile(r"summary\.json|parts/[\w-]+\.jsonl")
LARGEST_MEMBER, LARGEST_TOTAL = 64 << 20, 256 << 20
"""Bytes that an archive may unpack to; what comes back is a few MiB."""
LARGEST_NUMBER, LARGEST_SIZE = 1e18, 1 << 13
"""Above all that a GPU of today can bring, in FLOP and bytes a second; above every size of a shape or a tile."""
LEAST_REPEATS = 3
"""Samples below which a median says nothing of its noise, and nothing is advised."""
UNKNOWN_DEVICE = "unknown device"
HEAD_SIZE_FLOP = {"forward": 4, "backward": 10}
"""FLOP of a visible pair and head size: two products forward, five backward."""
CALL = ", call "
"""Between the name of a part and the number of its call, where several calls are put together."""


class Refused(ValueError):
    """What the command line asks for cannot be done; the text, one line, says why."""


class Config(NamedTuple):
    """Launch configuration of an attention kernel."""

    rows: int
    keys: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}, {self.warps} warps, {self.stages} stages"


class Shape(NamedTuple):
    """Sizes of two-stream attention."""

    batch: int
    heads: int
    tokens: int
    cut: int
    size: int

    @property
    def is_target(self) -> bool:
        """Whether it is the shape that targets are for."""
        return (self.batch * self.heads, self.tokens, self.cut, self.size) == (3072, 197, 50, 64)

    @property
    def visible_pairs(self) -> int:
        """Pairs of a row and a key it sees, over images and heads: each of the N + 2 T rows sees N keys."""
        return self.batch * self.heads * self.tokens * (3 * self.tokens - 2 * self.cut)

    def __str__(self) -> str:
        return f"N {self.tokens} c {self.cut} B {self.batch} H {self.heads} D {self.size}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of an op of attention. default: in the configuration of the launch table (peers have none)."""

    part: str
    op: str
    way: str
    shape: Shape
    dtype: str
    config: Config | None
    default: bool
    p20: float
    p50: float
    p80: float
    repeats: int

    @property
    def noise(self) -> str:
        """(p80 - p20) / p50, for a page."""
        return noise_words((self.p80 - self.p20) / self.p50, self.repeats)

    @property
    def flop_per_s(self) -> float:
        """Of a whole pass, on visible pairs."""
        return HEAD_SIZE_FLOP[self.op] * self.shape.size * self.shape.visible_pairs / (self.p50 / 1e3)


def noise_words(noise: float, repeats: int | None) -> str:
    """A share as a percentage; "-" where there were too few samples for one, or their number is not known."""
    return "-" if repeats is None or repeats < LEAST_REPEATS else f"{noise:.0%}"


@dataclass
class Harvest:
    """Rows by kind, what became of the parts, and what could not be read.

    Attributes:
        summary: summary.json; empty where it is missing or damaged.
        rows: of each kind, in the order they were written.
        times: of the rows "time", the newest with the most repeats of what was timed several times.
        damage: a line for everything that could not be read.
        calls: of several calls together, each alone; empty where this is one.
    """

    summary: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    times: list[Timing] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    calls: list[Harvest] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Its name, or UNKNOWN_DEVICE."""
        names = [self.summary.get("device"), *(row.get("device") for row in self.of("machine"))]
        return next((name for name in names if isinstance(name, str) and name), UNKNOWN_DEVICE)

    @property
    def dry_run(self) -> bool:
        """Whether it went through the parts on a CPU and measured nothing."""
        return bool(self.summary.get("dry_run"))

    @property
    def outcomes(self) -> dict[str, dict[str, Any]]:
        """What became of each part."""
        return self.summary.get("parts") or {}

    @property
    def is_second(self) -> bool:
        """Whether it is a second call."""
        return self.summary.get("call") == 2

    def of(self, kind: str, **wanted: Any) -> list[dict[str, Any]]:
        """Rows of a kind with these values."""
        return [row for row in self.rows.get(kind, []) if all(row.get(name) == value for name, value in wanted.items())]

    def timings(self, **wanted: Any) -> list[Timing]:
        """Timings with these values of their fields."""
        return [time for time in self.times if all(getattr(time, name) == value for name, value in wanted.items())]

    def ceiling(self, name: str) -> float | None:
        """The best of a ceiling's values."""
        return max((row["value"] for row in self.of("ceiling", name=name)), default=None)


def base_part(part: str | None) -> str:
    """The name of a part without its call."""
    return str(part).partition(CALL)[0]


def together(calls: Sequence[Harvest]) -> Harvest:
    """Several calls as one harvest, in the order they began; the names of its parts say of which call each is.

    So nothing is taken for measured in turn that was not. Device, versions and commit are those of the last call.

    Raises:
        Refused: dry runs and real ones together.
    """
    if len(calls) == 1:
        return calls[0]
    if len({call.dry_run for call in calls}) > 1:
        raise Refused("a dry run and a real one make no page together")
    calls = sorted(calls, key=lambda call: str(call.summary.get("started")))
    whole = Harvest(calls[-1].summary | {"parts": {}, "device": calls[-1].device}, calls=calls)
    for number, call in enumerate(calls, 1):
        suffix = f"{CALL}{number}"
        whole.summary["parts"] |= {f"{name}{suffix}": outcome for name, outcome in call.outcomes.items()}
        for kind, rows in call.rows.items():
            named = [row | {"part": f"{row.get('part') or 'unknown part'}{suffix}"} for row in rows]
            whole.rows.setdefault(kind, []).extend(named)
        whole.times += [replace(time, part=f"{time.part}{suffix}") for time in call.times]
        whole.damage += [f"call {number}: {line}" for line in call.damage]
    return whole


def read(folder: Path) -> Harvest:
    """The harvest in a folder: parts/ and summary.json, or the archive that holds them.

    Raises:
        Refused: neither is there.
    """
    harvest = Harvest()
    if (folder / "summary.json").exists() or (folder / "parts").is_dir():
        paths = [folder / "summary.json", *sorted((folder / "parts").glob("*.jsonl"))]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.exists()}
    elif (folder / ARCHIVE).exists():
        files = unpacked(folder / ARCHIVE, harvest.damage)
    else:
        raise Refused(f"{folder} holds no harvest: neither {ARCHIVE} nor summary.json and parts/")
    try:
        harvest.summary = as_summary(json.loads(files.pop("summary.json")))
    except KeyError:
        harvest.damage.append("summary.json is missing: what failed is not known")
    except (ValueError, RecursionError) as error:
        harvest.damage.append(f"summary.json is damaged: {error}")
    times: dict[tuple[Any, ...], Timing] = {}
    for name, text in sorted(files.items()):
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = as_row(json.loads(line))
                if row["kind"] == "time":
                    keep_better(times, as_timing(row))
                harvest.rows.setdefault(row["kind"], []).append(row)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                harvest.damage.append(f"{Path(name).name}, line {number}: {type(error).__name__}: {error}")
    harvest.times = list(times.values())
    return harvest


def unpacked(archive: Path, damage: list[str]) -> dict[str, bytes]:
    """What belongs to a harvest, by name, as far as the archive is whole; what was left out is added to the damage."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not member.isfile() or not MEMBER.fullmatch(member.name):
                    damage += [] if member.isdir() else [f"{ARCHIVE}: {member.name} is no file of a harvest"]
                elif member.size > LARGEST_MEMBER or sum(map(len, files.values())) + member.size > LARGEST_TOTAL:
                    damage.append(f"{ARCHIVE}: {member.name} is too large ({member.size} bytes)")
                else:
                    files[member.name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        damage.append(f"{ARCHIVE} cannot be read to its end: {type(error).__name__}: {error}")
    return files


def keep_better(times: dict[tuple[Any, ...], Timing], time: Timing) -> None:
    """A later round of the same has more repeats and replaces the first, unless it was cut short."""
    key = (time.part, time.op, time.way, time.shape, time.dtype, time.config, time.default)
    if key not in times or time.repeats >= times[key].repeats:
        times[key] = time


def as_summary(value: Any) -> dict[str, Any]:
    """The summary, without parts of which it does not say what became of them; ValueError where it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("parts", {}), dict):
        raise ValueError("not an object with parts")
    parts = value.get("parts", {}).items()
    return value | {"parts": {name: x for name, x in parts if isinstance(x, dict) and isinstance(x.get("status"), str)}}


MEDIANS = {"p20_ms": float, "p50_ms": float, "p80_ms": float}
FIELDS: Mapping[str, Mapping[str, type]] = {
    "time": {"part": str, "op": str, "way": str, "dtype": str, "shape": dict, "repeats": float, **MEDIANS},
    "ceiling": {"name": str, "value": float},
    "check": {"what": str, "ok": bool},
    "counters": {"kernel": str, "metrics": dict},
    "bandwidth": {"op": str, "bytes_per_s": float},
    "step": {"model": str, "mode": str, "way": str, "images_per_s": float, **MEDIANS},
    "kmeans": {"way": str, "shape": dict, "flops_per_s": float, **MEDIANS},
    "memory": {"model": str, "recompute": str, "micro_batch": float, "planned_bytes": float},
}
"""What the page reads of a row of a kind; a float is a number above 0."""


def as_row(value: Any) -> dict[str, Any]:
    """ValueError, KeyError or TypeError for what is no row, or lacks what its kind has."""
    if not isinstance(value, dict) or not isinstance(value["kind"], str):
        raise ValueError("not an object with a kind")
    for name, kind in FIELDS.get(value["kind"], {}).items():
        if kind is float:
            positive(value, name)
        elif not isinstance(value[name], kind):
            raise ValueError(f"{name} is {value[name]!r}")
    return value


def as_timing(row: Mapping[str, Any]) -> Timing:
    """A row "time"."""
    config = row.get("config")
    return Timing(
        *(row[name] for name in ("part", "op", "way")),
        Shape(**{name: int(positive(row["shape"], name, LARGEST_SIZE)) for name in Shape._fields}),
        row["dtype"],
        None if config is None else as_config(config),
        bool(row.get("default", True)),
        *(float(row[name]) for name in MEDIANS),
        int(row["repeats"]),
    )


def as_config(value: Mapping[str, Any]) -> Config:
    """ValueError, KeyError or TypeError for what is none."""
    return Config(**{name: int(positive(value, name, LARGEST_SIZE)) for name in Config._fields})


def positive(row: Mapping[str, Any], name: str, most: float = LARGEST_NUMBER) -> float:
    """A number above 0 and up to `most`; ValueError for anything else."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ValueError(f"{name} is {str(value)[:40]}, not a number above 0 and at most {most:g}")
    return float(value)
