"""Which implementation of an op runs: a pure choice by name, device and what is installed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

ATTENTION_BACKENDS = ("reference", "sdpa")


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Attention backends by name, each with None where it runs on `device` or else the reason why it does not."""
    device = torch.device(device)
    reason = None if device.type in ("cpu", "cuda") else f"needs a CPU or CUDA device, not {device.type}"
    return {"reference": None, "sdpa": reason}


def choose_backend(requested: str, device: torch.device | str) -> str:
    """The attention backend for a request: "auto" takes the fastest that runs on the device.

    Raises:
        ValueError: the name is unknown, or the backend cannot run on the device; the text says why.
    """
    available = available_backends(device)
    if requested == "auto":
        return "sdpa" if available["sdpa"] is None else "reference"
    if requested not in available:
        raise ValueError(f"unknown backend {requested!r}; backends are auto, {', '.join(available)}")
    if (reason := available[requested]) is not None:
        raise ValueError(f"backend {requested!r} cannot run here: {reason}")
    return requested


def choose_listed_backend(requested: str, listed: Mapping[str, object]) -> str:
    """The backend for a request, of an op whose backends run on every device: "auto" takes the first.

    Raises:
        ValueError: the name is unknown.
    """
    if requested == "auto":
        return next(iter(listed))
    if requested not in listed:
        raise ValueError(f"unknown backend {requested!r}; backends are auto, {', '.join(listed)}")
    return requested
