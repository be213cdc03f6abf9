"""What a part of the harvest is, and what it is given. Nothing but the standard library, as in the process above."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, TIMED_OUT, KILLED, OUT_OF_MEMORY, SKIPPED = (
    "ok", "failed", "timed out", "killed", "out of memory", "skipped",
)  # fmt: skip
"""What can become of a part."""


class Skipped(Exception):
    """A part that this machine cannot run; the text says why."""


@dataclass(frozen=True)
class Part:
    """A part of the harvest.

    Attributes:
        name: of its records and its place in the summary; letters, digits, - and _.
        call: "module:function"; the function takes a `Run`.
        seconds: its slice of a call; slices are scaled to what is left, so only their proportions count.
        stage: consecutive parts of one stage run side by side; a part without one runs alone.
        arguments: for the function, plain JSON values.
        environment: variables of its process.
        kernels: whether it launches Triton kernels, which a dry run interprets.
    """

    name: str
    call: str
    seconds: float
    stage: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    kernels: bool = False


@dataclass(frozen=True)
class Run:
    """One run of a part, in its own process.

    Attributes:
        folder: for files that come back beside the records.
        seconds: that the part may take from `began`, a reading of time.monotonic.
        dry: on a CPU, with small sizes.
        arguments: of the part.
    """

    name: str
    folder: Path
    seconds: float
    dry: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def records(self) -> Path:
        """One JSON object a line."""
        return records_file(self.folder, self.name)

    def left(self) -> float:
        """Seconds left; 0 or less when they are over."""
        return self.began + self.seconds - time.monotonic()

    def record(self, kind: str, **figures: Any) -> None:
        """Append a line to the records, on disk when this returns. A number that is not finite becomes null."""
        line = json.dumps({"part": self.name, "kind": kind, **_finite(figures)}, default=str)
        with self.records.open("a") as file:
            file.write(line + "\n")


def records_file(folder: Path, name: str) -> Path:
    """Where the records of a part are."""
    return folder / "parts" / f"{name}.jsonl"


def end_file(folder: Path, name: str) -> Path:
    """What a part's process says of itself at its end: status, reason, traceback. One that is killed says nothing."""
    return folder / "ends" / f"{name}.json"


def ready_file(folder: Path, name: str) -> Path:
    """Is there once a part's process has imported what it needs."""
    return folder / "ends" / f"{name}.ready"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a records file; a line that was cut off in the middle is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
