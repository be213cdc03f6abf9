"""ViT-B under a cap of 16 GiB: does the step fit with as many images as the plan says, and is the plan right?"""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from bench.harvesting import step
from bench.harvesting.common import device_of
from bench.harvesting.part import Run

CAP = 16 << 30
CASES = ((96, "none"), (128, "cheap"), (512, "blocks"))
"""(images, what is recomputed)."""
STEPS = 3


def measure(run: Run) -> None:
    """A row for each case; one that does not fit says so, and costs nothing but itself."""
    if (device := device_of(run)).type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total), device)
    for images, recompute in CASES:
        if run.left() <= 0:
            return
        case(run, images, recompute)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def case(run: Run, images: int, recompute: str) -> None:
    """Peak of a step beside the plan's."""
    setting = step.setting_for(replace(run, arguments={"model": "base", "batch": images}))
    from mapet.distributed import World
    from mapet.planning.memory import predict_memory, step_size
    from mapet.training.learner import Learner

    config = setting.config
    config = replace(config, train=replace(config.train, recompute=recompute))
    planned = predict_memory(step_size(config, 1)).total
    row = {"model": "base", "micro_batch": setting.sizes.batch, "recompute": recompute, "planned_bytes": planned}
    try:
        learner = Learner(config, World(setting.device), setting.plan)
        for number in range(STEPS):
            if number == STEPS - 1 and setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            learner.step(number, setting.batch, with_accuracy=False)
        learner.read()
    except torch.OutOfMemoryError as error:
        run.record("memory", **row, peak_bytes=None, fits=False, reason=str(error)[:300])
        return
    peak = torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else None
    run.record("memory", **row, peak_bytes=peak, fits=True, reason=None)
