"""AdamW with the official weight-decay groups, an update that can be called off on the device, and a weight average."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mapet.checked import conform
from mapet.config import OptimConfig
from mapet.files import check_like
from mapet.training.parallel import as_parts_of, whole


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over a task's parameter groups, in its fused form, which runs on CPU and CUDA alike.

    That form takes a tensor that calls the update off, see `gated_step`.
    """
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def gated_step(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """One update, or none at all where `skip` (scalar float32 on the device) is 1; the host never waits for `skip`.

    These two attributes are how GradScaler tells a fused optimizer of an overflow.
    """
    optimizer.grad_scale, optimizer.found_inf = None, skip
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """The global gradient norm (scalar tensor); gradients are then scaled to norm `limit` at most, 0 for no limit.

    The norm is that of the whole gradients where each process has parts of them.
    """
    parameters = list(parameters)
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def check_optimizer_state(state: Any, optimizer: torch.optim.AdamW) -> None:
    """ValueError unless an optimizer state dict, of whole tensors, is one of these parameters after some update.

    Shapes matter above all: the fused update on the CPU writes as far as the parameter is long, whatever it is given.
    """
    state = conform(dict[str, Any], state, "optimizer")
    groups = conform(list[dict[str, Any]], state.get("param_groups"), "optimizer.param_groups")
    # What else there is in a group follows from the configuration.
    members = conform(list[list[int]], [group.get("params") for group in groups], "optimizer.param_groups")
    if members != [group["params"] for group in optimizer.state_dict()["param_groups"]]:
        raise ValueError("optimizer.param_groups are not those of this network")
    moments = conform(dict[int, dict[str, Any]], state.get("state"), "optimizer.state")
    if not moments:
        return  # no update was made: in fp16 the first ones may be skipped
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    example = {i: moments_like(parameter) for i, parameter in enumerate(parameters)}
    check_like(moments, example, "optimizer.state")
    for i, values in moments.items():
        for name in ("step", "exp_avg_sq"):
            if (values[name] < 0).any():
                raise ValueError(f"optimizer.state.{i}.{name} has negative numbers")


def moments_like(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter, as whole tensors without values."""
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return {"step": torch.empty((), device="meta", dtype=torch.float32), "exp_avg": whole, "exp_avg_sq": whole}


class WeightAverage:
    """Exponential moving average of the trained weights, in float32: average += (1 - decay) (weights - average)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().float().clone() for name, value in trained(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, skip: Tensor) -> None:
        """Move towards the weights of `module`, unless `skip` (scalar float32 tensor) is 1."""
        current = trained(module)
        averages = list(self.weights.values())
        change = torch._foreach_sub([current[name].detach().float() for name in self.weights], averages)
        torch._foreach_mul_(change, (1 - self.decay) * (1 - skip))
        torch._foreach_add_(averages, change)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over the averages of a checkpoint."""
        for name, value in self.weights.items():
            value.copy_(as_parts_of(weights[name], value))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
