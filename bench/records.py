"""Append-only records: one JSON file a run, with everything needed to judge its figures."""

from __future__ import annotations

import importlib.metadata
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

from bench import gpu

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Command, commit, machine and versions of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
        },
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds, the number of repeats, and the noise: (p80 - p20) / p50."""
    ordered = sorted(seconds)
    at = {p: ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] * 1e3 for p in (20, 50, 80)}
    noise = round((at[80] - at[20]) / at[50], 4) if at[50] else 0.0
    # Four digits after the point: a kernel may take a few microseconds.
    return {**{f"p{p}_ms": round(value, 4) for p, value in at.items()}, "noise": noise, "repeats": len(ordered)}


def device_state(device: torch.device) -> dict[str, Any]:
    """What is measured on: the GPU with clocks and temperature, or the CPU and how busy its machine is."""
    if device.type == "cpu":
        return {"name": f"CPU, {cpu_name()}, threads: {torch.get_num_threads()}", "load": os.getloadavg()}
    return {**gpu.describe(device), "sensors": gpu.sensors(device)}


def write(suite: str, label: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a new record file and return its path; an existing one is never touched."""
    draft = Draft(suite, label, folder)
    draft.write(results)
    return draft.finish()


class Draft:
    """A record that grows during a long run: a file NAME.json.partial, which `finish` makes NAME.json.

    What was written last survives if the process is killed.
    """

    def __init__(self, suite: str, label: str, folder: Path = RESULTS) -> None:
        self.head = {"suite": suite, **environment()}
        stamp = self.head["time"].replace(":", "").replace("-", "")[:15]
        self.path = Path(folder) / f"{suite}_{label}_{stamp}.json"
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, results: dict[str, Any]) -> None:
        """Replace what the draft holds."""
        fresh = self.path.with_name(f"{self.path.name}.new")
        fresh.write_text(json.dumps({**self.head, **results}, indent=1) + "\n")
        fresh.replace(self.partial)

    def finish(self) -> Path:
        """Make the draft a record and return its path.

        Raises:
            FileExistsError: there is such a record already; it stays as it is.
        """
        with self.path.open("x") as file:
            file.write(self.partial.read_text())
        self.partial.unlink()
        return self.path


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of this checkout: what a file COMMIT at its top says, where there is one, else git; empty where neither knows."""
    told = RESULTS.parent.parent / "COMMIT"
    return told.read_text().strip() if told.exists() else _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str:
    """What git says; nothing where it is not installed."""
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    except OSError:
        return ""
    return result.stdout.strip()


def cpu_name() -> str:
    """The processor's name, as well as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
