"""What the parts share: the device, dtypes and shapes of a run, and how times are recorded."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench import guard
from bench.harvesting.part import Run, Skipped
from bench.records import quantiles
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import TwoStreamShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGET_TOKENS, TARGET_CUT, HEADS, SIZE, BATCH = 197, 50, 12, 64, 256


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


def dtypes_of(run: Run, *names: str) -> dict[str, torch.dtype]:
    """Dtypes by name; in a dry run fp16 alone, as Triton's interpreter has no bf16."""
    return {name: DTYPES[name] for name in (("fp16",) if run.dry else names)}


def guarded(call: Callable[[], Any]) -> tuple[Any, guard.Failure | None]:
    """`guard.guarded`, with the whole traceback in the part's log."""

    def told() -> Any:
        try:
            return call()
        except Exception:
            traceback.print_exc()
            raise

    return guard.guarded(told)


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


def record_time(
    run: Run, op: str, way: str, seconds: Sequence[float], shape: TwoStreamShape, dtype: str,
    config: Mapping[str, int] | None = None, *, default: bool = True,
) -> None:  # fmt: skip
    """A row "time"; a later one of the same op, way, configuration, shape and dtype replaces it, with more repeats."""
    figures: dict[str, Any] = quantiles(seconds)
    run.record("time", op=op, way=way, config=config, shape=shape_row(shape), dtype=dtype, default=default, **figures)
