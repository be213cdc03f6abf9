"""A fit that can be killed at any time: everything it has found, in one file that is always whole."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1


@dataclass
class Best:
    """The best redo so far."""

    centroids: Tensor
    objective: float
    counts: Tensor
    splits: int
    redo: int


@dataclass
class FitState:
    """How far a fit is. `curve`, `splits` and `centroids` are of the current redo; all else it needs follows from
    the settings: every random number comes from the seed, the redo and the iteration."""

    redo: int = 0
    curve: list[float] = field(default_factory=list)
    splits: int = 0
    centroids: Tensor | None = None
    objectives: list[list[float]] = field(default_factory=list)
    best: Best | None = None


def write_state(path: Path, state: FitState, settings: dict[str, Any]) -> None:
    """Replace the file as a whole. OSError, with the earlier file untouched, where the disk does not take it."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, "settings": settings, "state": _on_cpu(asdict(state))}, content)
    payload = content.getbuffer()
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_state(path: Path, settings: dict[str, Any]) -> FitState | None:
    """The state in the file, on the CPU; None without a file.

    ValueError, naming the file, where it is damaged or of a fit of other data or settings.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    again = "remove it to start the fit again, or name another file"
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is damaged, or not the state of a k-means; {again}")
    try:
        saved = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
        version, before = saved["format"], saved["settings"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the state of a k-means; {again}") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; {again}")
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)}, is {settings.get(name)}" for name in changed)
        raise ValueError(f"{path} belongs to another fit: {listed}. Restore what differs; or {again}")
    state = FitState(**saved["state"])
    state.best = state.best and Best(**state.best)
    return state


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value
