"""The memory of the device: a cap on it, and what to say and do when it runs out."""

from __future__ import annotations

import torch

from mapet.config import RunConfig, change
from mapet.errors import ConfigError
from mapet.planning.memory import divisors, out_of_memory_advice, plan_run, step_size
from mapet.units import gib, parse_bytes


def cap_memory(limit: str, device: torch.device) -> None:
    """Let this process take so much of its GPU at most, the CUDA context excepted; an empty limit changes nothing.

    So a smaller card is rehearsed on a larger one. ConfigError on a CPU, or when the GPU has less.
    """
    if not limit:
        return
    if device.type != "cuda":
        raise ConfigError(
            f"train.gpu_memory {limit} caps the memory of a GPU, and this run is on {device}: leave it out"
        )
    wanted, total = parse_bytes(limit), torch.cuda.get_device_properties(device).total_memory
    if wanted > total:
        raise ConfigError(f"train.gpu_memory {limit} is more than {device} has, {gib(total)}")
    torch.cuda.set_per_process_memory_fraction(wanted / total, device)


def within_memory(config: RunConfig, processes: int) -> tuple[RunConfig, str]:
    """The configuration with the micro-batch and recomputation that fit train.gpu_memory, and what to say of them."""
    limit, train = config.train.gpu_memory, config.train
    if not limit or (train.micro_batch and train.recompute != "auto"):
        return config, ""
    plan = plan_run(config, processes)
    return change(config, {"train.micro_batch": plan.micro_batch, "train.recompute": plan.recompute}), (
        f"planned for {limit}: micro-batch {plan.micro_batch}, accumulation {plan.accumulation}, "
        f"recompute {plan.recompute}; {gib(plan.memory.total)} predicted"
    )


def memory_limit(config: RunConfig, device: torch.device) -> int:
    """Bytes that the process may take of its device; 0 for unknown (a CPU)."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return min(parse_bytes(config.train.gpu_memory), total or 2**63) if config.train.gpu_memory else total


def advice(config: RunConfig, device: torch.device, processes: int, micro_batch: int) -> str:
    """What to change after a step with this micro-batch ran out of memory: with numbers, where it can be planned."""
    try:
        return out_of_memory_advice(step_size(config, processes, micro_batch), memory_limit(config, device))
    except ConfigError as error:
        return (
            f"out of memory with micro-batch {micro_batch} and recompute {config.train.recomputed}; set a smaller "
            f"train.micro_batch, or train.recompute=blocks, or give --auto-batch; no numbers, as {error}"
        )


def halved(micro_batch: int, share: int) -> int:
    """The largest divisor of the share that is at most half the micro-batch; 0 where there is none."""
    return max((d for d in divisors(share) if 2 * d <= micro_batch), default=0)
