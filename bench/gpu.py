"""What the GPU of a measurement is, and how warm and fast it was."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from typing import Any

import torch

SENSORS = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
}
"""What nvidia-smi is asked for, and the name it gets in a record."""


def describe(device: torch.device) -> dict[str, Any]:
    """Name, compute capability, memory, multiprocessors and L2 cache of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


def sensors(device: torch.device) -> dict[str, float | str] | None:
    """Driver, clocks, temperature and power now, or None where nvidia-smi is missing or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(SENSORS)}", "--format=csv,noheader,nounits"]
    command.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
    try:
        return parse_sensors(subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout)
    except (OSError, subprocess.SubprocessError):
        return None


def parse_sensors(answer: str) -> dict[str, float | str] | None:
    """One line of nvidia-smi's answer; a sensor without a number keeps the words given, such as [N/A]."""
    fields = [field.strip() for field in answer.strip().split(",")]
    if len(fields) != len(SENSORS):
        return None
    found: dict[str, float | str] = dict(zip(SENSORS.values(), fields, strict=True))
    for name, field in found.items():
        if name != "driver":
            with suppress(ValueError):
                found[name] = float(field)
    return found
