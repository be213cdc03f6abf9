"""Which parts a call has, in which order and with which slices. Plain values: what they run is imported elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.harvest_advice import winners
from bench.harvest_data import Harvest
from bench.harvesting.part import OK, SKIPPED, Part

HERE = "bench.harvesting"
WAITING = {"CUDA_LAUNCH_BLOCKING": "1"}  # an error is then raised by the launch that made it
FEW = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}  # of processes that compile side by side
MACHINE = "machine"
"""The first part of every call; without a GPU it is the last, too."""
VARIANTS = ("plain", "last_block", "pim", "gather")


def _checks(name: str, call: str, **arguments: Any) -> Part:
    return Part(f"check_{name}", f"{HERE}.correctness:{call}", 60, "correctness", arguments, WAITING, kernels=True)


def _step(name: str, model: str, batch: int, seconds: float, **arguments: Any) -> Part:
    return Part(name, f"{HERE}.step:measure", seconds, "", {"model": model, "batch": batch, **arguments})


FIRST = (
    Part(MACHINE, f"{HERE}.machine:measure", 15),
    *(_checks(f"attention_{variant}", "attention", variant=variant) for variant in VARIANTS),
    _checks("embedding_kmeans", "embedding_and_kmeans"),
    # Beside the checks, as they wait on each launch anyway: what later parts would lose their time with.
    *(
        Part(f"warm_{op}", f"{HERE}.kernels:warm", 60, "correctness", {"op": op}, kernels=True)
        for op in ("forward", "dq", "dkdv")
    ),
    *(
        Part(f"warm_flex_{lengths[0]}", f"{HERE}.kernels:warm_flex", 60, "correctness", {"lengths": lengths}, FEW)
        for lengths in ([197, 50], [344, 785], [1025])
    ),
    *(
        Part(f"warm_step_{model}", f"{HERE}.step:warm", 60, "correctness", {"model": model, "batch": batch}, FEW)
        for model, batch in (("base", 128), ("small", 256), ("tiny", 512))
    ),
    Part("attention", f"{HERE}.kernels:contest", 60, kernels=True),
    Part("configurations", f"{HERE}.kernels:configurations", 55, kernels=True),
    Part("counters", f"{HERE}.counters:measure", 35, kernels=True),
    _step("step_base", "base", 128, 45, profile=True),
    _step("step_small", "small", 256, 30),
    _step("step_tiny", "tiny", 512, 30, graphs=True),
    Part("kmeans", f"{HERE}.kmeans:measure", 20, kernels=True),
    Part("memory", f"{HERE}.step:memory", 30),
)
"""The first call: slices of 380 seconds."""
ALL = {"all": True, "dtypes": ["bf16", "fp16"]}
ALONE = (Part("tune", f"{HERE}.kernels:configurations", 500, "", ALL, kernels=True),)
"""Parts that are only run by their names."""

AGAIN = 60.0
"""Seconds of a second call for all that failed in the first."""


def second(first: Harvest) -> list[Part]:
    """The second call, from what the first brought home: slices of 245 seconds, or AGAIN more.

    The machine, which may be another; what was skipped for lack of time, or failed in whichever way, once more;
    compute-sanitizer comes last, as it is slow and has hung devices.
    """
    failed = [part for part in FIRST[1:] if _failed(first.outcomes.get(part.name))]
    scale = AGAIN / max(AGAIN, sum(part.seconds for part in failed))
    best = best_configurations(first)
    return [
        FIRST[0],
        *(replace(part, seconds=part.seconds * scale, stage="") for part in failed),
        Part("tuned", f"{HERE}.kernels:tuned", 40, "", {"best": best}, kernels=True),
        _step("step_tuned", "base", 128, 25, best=best),
        _step("step_volta", "base", 32, 25, dtype="fp16", cap_gib=16),
        Part("volta_kernels", f"{HERE}.volta:measure", 80),
        Part("sanitizer", f"{HERE}.sanitizer:measure", 60, kernels=True),
    ]


def _failed(outcome: dict[str, Any] | None) -> bool:
    """Whether a part is worth running again; one that this machine cannot run is not."""
    if outcome is None:
        return True
    never_began = outcome["status"] == SKIPPED and outcome.get("returncode") is None
    return never_began or outcome["status"] not in (OK, SKIPPED)


def best_configurations(first: Harvest) -> dict[str, dict[str, int]]:
    """By op, the fastest launch configuration, by the rule of the page; of bf16 where it was timed."""
    return {x.op: x.best._asdict() for x in reversed(winners(first))}
