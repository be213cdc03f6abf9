"""Append-only records: one JSON file a run, with everything needed to judge its figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Command, commit, machine and versions of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds, and the number of repeats."""
    ordered = sorted(seconds)
    at = {p: ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] * 1e3 for p in (20, 50, 80)}
    return {**{f"p{p}_ms": round(value, 3) for p, value in at.items()}, "repeats": len(ordered)}


def write(suite: str, label: str, results: dict[str, Any]) -> Path:
    """Write a new record file and return its path; an existing one is never touched."""
    RESULTS.mkdir(exist_ok=True)
    record = {"suite": suite, **environment(), **results}
    stamp = record["time"].replace(":", "").replace("-", "")[:15]
    path = RESULTS / f"{suite}_{label}_{stamp}.json"
    with path.open("x") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    return path


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
