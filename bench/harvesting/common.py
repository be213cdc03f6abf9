"""What the parts share: the device, dtypes and shapes of a run, and how ways are made and timed."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import guard, timing
from bench.harvesting.part import Run, Skipped
from bench.timing import Clock
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import TwoStreamShape

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGET_TOKENS, TARGET_CUT, HEADS, SIZE, BATCH = 197, 50, 12, 64, 256

Way = Callable[[Clock], dict[str, float]]
"""Clock -> seconds by op, once through."""


def device_of(run: Run) -> torch.device:
    """The GPU, or in a dry run the CPU.

    Raises:
        Skipped: there is no GPU.
    """
    if run.dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Skipped("torch finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def tool(name: str) -> str | None:
    """A program's path: on PATH, or in the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


def dtypes_of(run: Run, *names: str) -> dict[str, torch.dtype]:
    """Dtypes by name; in a dry run fp16 alone, as Triton's interpreter has no bf16."""
    return {name: DTYPES[name] for name in (("fp16",) if run.dry else names)}


def attention_shape(run: Run, tokens: int = TARGET_TOKENS) -> TwoStreamShape:
    """A shape with as many tokens in all as the target has, and the same share of them not predicted."""
    if run.dry:
        return TwoStreamShape(max(5, tokens // 25), max(2, tokens // 80), 1, 1, 16)
    batch = max(1, round(BATCH * TARGET_TOKENS / tokens))
    return TwoStreamShape(tokens, round(tokens * TARGET_CUT / TARGET_TOKENS), batch, HEADS, SIZE)


def shape_row(shape: TwoStreamShape) -> dict[str, int]:
    """As rows tell it."""
    return {"batch": shape.batch, "heads": shape.heads, "tokens": shape.tokens, "cut": shape.cuts, "size": shape.size}


def config_row(config: LaunchConfig) -> dict[str, int]:
    """As rows tell it."""
    return {"rows": config.rows, "keys": config.keys, "warps": config.warps, "stages": config.stages}


def guarded(call: Callable[[], Any]) -> tuple[Any, guard.Failure | None]:
    """`guard.guarded`, with the whole traceback in the part's log."""

    def told() -> Any:
        try:
            return call()
        except Exception:
            traceback.print_exc()
            raise

    return guard.guarded(told)


def attempt(run: Run, way: str, call: Callable[[], Any], **told: Any) -> Any:
    """What the call returned, or None, and then a row that says why."""
    result, failure = guarded(call)
    if failure is not None:
        run.record("failure", way=way, reason=failure.reason, **told)
    return result


def timed(
    run: Run, ways: Mapping[Hashable, Way], repeats: int, budget: float, **told: Any
) -> dict[Any, dict[str, list[float]]]:
    """Samples by way and op, interleaved, of about `budget` seconds a way; one that fails is told in a row."""
    seconds, reasons = timing.interleaved(
        ways, timing.clock_for(device_of(run)), repeats=repeats, budget=budget, deadline=timing.Deadline(run.left()),
        guard=guarded, sample=lambda way, clock: way(clock),
    )  # fmt: skip
    for way, failure in reasons.items():
        run.record("failure", way=str(way), reason=failure.reason, **told)
    return seconds


def calls(by_op: Mapping[str, Callable[[], Any]]) -> Way:
    """Calls, each timed alone."""
    return lambda clock: {op: clock.time(call)[1] for op, call in by_op.items()}
