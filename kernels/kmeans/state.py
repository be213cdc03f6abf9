"""A fit that can be killed at any time: everything it has found, in one file that is always whole."""

from __future__ import annotations

import hashlib
import io
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapet_kernels.regular import load_plain, read_regular

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
    again = "remove it to start the fit again, or name another file"
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; {again}") from error
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is damaged, or not the state of a k-means; {again}")
    try:
        saved = load_plain(io.BytesIO(content[32:]))
        version, before = saved["format"], dict(saved["settings"])
    except Exception as error:  # damaged bytes fail in as many ways as there are bytes; no code was run
        raise ValueError(f"{path} is not the state of a k-means; {again}") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; {again}")
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)}, is {settings.get(name)}" for name in changed)
        raise ValueError(f"{path} belongs to another fit: {listed}. Restore what differs; or {again}")
    try:
        best = saved["state"].pop("best")
        state = FitState(**saved["state"], best=Best(**best) if best else None)
        _check(state, settings)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a state of this k-means; {again}") from error
    return state


def _check(state: FitState, settings: dict[str, Any]) -> None:
    """ValueError unless the state is one that a fit with these settings can be in."""
    best, redos, iterations = state.best, settings["redos"], settings["iterations"]
    curves = [*state.objectives, state.curve]
    numbers = [state.redo, state.splits, *((best.redo, best.splits) if best else ())]
    losses = [*(loss for curve in curves for loss in curve), *((best.objective,) if best else ())]
    known = (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(type(loss) is float and math.isfinite(loss) for loss in losses)
        and state.redo == len(state.objectives) <= redos
        and all(0 < len(curve) <= iterations for curve in state.objectives)
        and len(state.curve) < iterations
        and (state.centroids is not None or not state.curve)
        and (best is None if state.redo == 0 else best is not None and best.redo < state.redo)
    )
    shape = (settings["clusters"], settings["features"])
    for centroids in (state.centroids, best and best.centroids):
        known = known and (centroids is None or _is_centroids(centroids, shape))
    if known and best is not None:
        counts = best.counts
        known = counts.dtype == torch.int64 and tuple(counts.shape) == shape[:1] and bool((counts >= 0).all())
    if not known:
        raise ValueError("impossible state")


def _is_centroids(value: Tensor, shape: tuple[int, int]) -> bool:
    kinds = (torch.float32, torch.float64)
    return value.dtype in kinds and tuple(value.shape) == shape and bool(value.isfinite().all())


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value
