"""Matrix products in fp8 by torchao, with one scale a tensor, found anew each time; the backward pass alike.

Inputs and weights are e4m3, gradients e5m2. On a CPU the products are emulated: the same rounding, no gain, so that the
accuracy can be looked at anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mapet.errors import ConfigError

LEAST_CAPABILITY = (8, 9)
"""The oldest GPUs with fp8 matrix products."""


def check_fp8(device: torch.device) -> None:
    """ConfigError when the package is missing, or the GPU has no fp8 matrix products."""
    _torchao()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"speed.fp8 needs a GPU of compute capability 8.9 or newer, {device} has {major}.{minor}: leave it off"
        )


def fp8_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function like torch.nn.functional.linear: x (R, in), weight (out, in), bias (out,) -> (R, out).

    Under autocast, in its dtype. ConfigError when the package is missing.
    """
    module = _torchao()
    Float8Linear, Float8LinearConfig = module.Float8Linear, module.Float8LinearConfig

    @functools.cache
    def settings(emulated: bool) -> tuple:
        # Rows are the inner dimension of the weights' gradient, which the hardware wants in multiples of 16.
        config = Float8LinearConfig(emulate=emulated, pad_inner_dim=not emulated)
        layer = Float8Linear.from_float(nn.Linear(16, 16, device="meta"), config)
        return layer.linear_mm_config, config

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product = module.matmul_with_hp_or_float8_args.apply(x, weight.t(), *settings(x.device.type == "cpu"))
        return product + bias.to(product.dtype)

    return linear


def _torchao():
    try:
        from torchao.float8 import float8_linear
    except ImportError as error:
        raise ConfigError(
            f"speed.fp8 needs the package torchao ({error}): pip install torchao, or leave it off"
        ) from error
    return float8_linear
