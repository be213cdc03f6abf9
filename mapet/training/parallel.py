"""How the processes of a run share a network: each keeps a copy (DDP), or a part of every weight (FSDP2).

Sharded, every unit of a task, such as a block, is one of its own, and the task around them one more, with the
embedding, the last norm and the head: a unit's weights are whole from the beginning of its forward pass to the end,
and again in its backward pass. So what a module's forward reads of a weight, as it is or folded into another, must
belong to that module, its unit, or the task, which is whole all along. Gradients, optimizer state and moving average
exist in parts only, and what is elementwise, norms included, is done on the parts. A checkpoint holds whole tensors
either way, so that any number of processes goes on from it, in either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mapet.config import RunConfig
from mapet.distributed import World
from mapet.errors import ConfigError
from mapet.task import Task

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def check_parallel(config: RunConfig, world: World) -> None:
    """ConfigError for what does not go together with sharded weights."""
    if not shards(config, world):
        return
    if config.train.auto_batch:
        raise ConfigError(
            "train.auto_batch does not go with train.parallel fsdp: a process that runs out of memory leaves the "
            "others waiting for its part of the weights; set train.micro_batch, which `mapet plan` chooses"
        )
    if config.speed.fp8:
        raise ConfigError("speed.fp8 does not go with train.parallel fsdp; turn one of them off")


def shards(config: RunConfig, world: World) -> bool:
    """Whether weights exist in parts; a single process has them whole whatever the configuration says."""
    return config.train.parallel == "fsdp" and world.size > 1


def compile_network(task: Task, *, sharded: bool) -> None:
    """torch.compile of the task; sharded, of each of its units, between whose passes weights are gathered."""
    for module in task.units() if sharded else [task]:
        module.compile(dynamic=False)


def distribute(task: Task, world: World, *, sharded: bool) -> nn.Module:
    """`task` on its device, with gradients that are averaged over the processes; call what is returned.

    Sharded, the task's own parameters become parts, so optimizer and average are made after this; and its units
    reach the device one at a time.
    """
    if not sharded:
        return world.wrap(task.to(world.device))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # half a second, which runs of one process have no need of

    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in [*task.units(), task]:
        fully_shard(unit, mesh=mesh, shard_placement_fn=lambda parameter: placement(parameter, world.size))
    return task.to(world.device)


def placement(parameter: Tensor, processes: int) -> Shard | None:
    """The first dimension that all processes get an equal part of; None for FSDP's own choice where there is none.

    Position and class token have a first dimension of 1: by FSDP's choice they would be in one process whole.
    """
    from torch.distributed.tensor import Shard

    even = (dimension for dimension, size in enumerate(parameter.shape) if size % processes == 0)
    return next(map(Shard, even), None)


@contextmanager
def reducing(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether backward passes in the block average gradients over the processes, or only add them up in each."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not wanted:
        with network.no_sync():
            yield
        return
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(wanted)
    yield


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor, whose class is half a second to import."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that exists in parts, or as partial sums, made whole in every process; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(value: Any, keep: bool) -> Any:
    """Nested dicts, lists and tuples with every sharded tensor made whole, on the CPU; all processes take part.

    Where `keep` is false, None stands for these tensors, so that one process holds them and no other.
    """
    if isinstance(value, dict):
        return {name: gathered(part, keep) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(part, keep) for part in value)
    if not is_sharded(value):
        return value
    tensor = value.detach().full_tensor()
    return tensor.cpu() if keep else None


def as_parts_of(value: Tensor, example: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as `example` is; as it is where that is not. Nothing is sent."""
    if not is_sharded(example):
        return value
    from torch.distributed.tensor import distribute_tensor

    on_device = value.to(example.device)
    return distribute_tensor(on_device, example.device_mesh, example.placements, src_data_rank=None)


def weights_as_parts(weights: dict[str, Tensor], examples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights by name, each as its example; a name without one stays as it is."""
    return {name: as_parts_of(value, examples.get(name, value)) for name, value in weights.items()}


def optimizer_as_parts(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimizer state dict with the moments of each parameter sharded as it is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: as_parts_of(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}
