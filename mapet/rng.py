"""Randomness of a run.

Everything random in optimizer step t comes from generators seeded by (seed, t, purpose) and is drawn for the whole
global batch, then sliced. So a step is the same whatever the number of processes, micro-batches, workers or resumes.
The global generators only initialise the weights; their states are in the checkpoint all the same.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch

from mapet.checked import Range, conform
from mapet.files import check_like

Word = Annotated[int, Range(0, 2**32 - 1)]
WORDS = 624
"""Of the Mersenne twister, python's and numpy's; the position within them may be this number too."""


def step_seed(seed: int, step: int, purpose: str) -> int:
    """A seed in [0, 2^63) that differs in every bit, on average half of them, when any argument changes."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def step_generator(seed: int, step: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for one purpose ("plan", "color_jitter", ...) of one optimizer step."""
    return torch.Generator(device).manual_seed(step_seed(seed, step, purpose))


@dataclass(frozen=True)
class StepRng:
    """The generators of one step, each a pure function of (seed, step, purpose)."""

    seed: int
    step: int
    device: torch.device | str = "cpu"
    """Where values are drawn that the host need not know."""

    def generator(self, purpose: str, device: torch.device | str | None = None) -> torch.Generator:
        """A fresh generator for one purpose, on `device` or on that of the step."""
        return step_generator(self.seed, self.step, purpose, device or self.device)


def seed_global_generators(seed: int) -> None:
    """Seed the global generators of python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def global_rng_state(device: torch.device) -> dict[str, Any]:
    """States of the global generators as tensors and plain numbers, which torch.load reads with weights_only=True."""
    version, words, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, np.int64)), int(pos), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def check_global_rng_state(state: Any, device: torch.device) -> None:
    """ValueError for what cannot be the state of the generators; numpy, for one, reads wherever a position points."""
    example, given = global_rng_state(device), dict(conform(dict[str, Any], state, "random"))
    if not ("cuda" in example and "cuda" in given):  # of no use on the CPU, and absent when the run began there
        example.pop("cuda", None), given.pop("cuda", None)
    del example["python"]  # whose last part is of more than one type
    _, words, _ = conform(tuple[Literal[3], list[Word], float | None], given.pop("python", None), "random.python")
    check_like(given, example, "random")
    name, keys, position, has_gauss, _ = state["numpy"]
    whole = len(words) == WORDS + 1 and max(words[-1], position) <= WORDS and position >= 0
    if not whole or name != "MT19937" or has_gauss not in (0, 1) or not 0 <= keys.min() <= keys.max() < 2**32:
        raise ValueError("random is not the state of a Mersenne twister")


def set_global_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `global_rng_state`. A CUDA state is ignored on the CPU, and absent when the run began there."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Within the block, and if `enabled`: torch's deterministic algorithms, at some cost in speed."""
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        # cuBLAS reads this when the first handle is made; without it torch refuses its products as not deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
