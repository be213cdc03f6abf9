"""Bytes of live tensors during a training step, counted without computing anything: fake tensors and a dispatch mode.

Fake tensors have shapes, dtypes and storages of the right size, but no memory; a CUDA device cannot be faked through a
backward pass on a machine without one, so the step is faked on the CPU, with a GPU's sizes of chunks.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from bench.memory import LiveBytes
from bench.memory import storage_bytes as _bytes
from mapet.config import ModelConfig, ObjectiveConfig, OptimConfig
from mapet.model.vit import MaskedTokenViT
from mapet.objectives import Objective, build_objective, loss
from mapet.training.optim import WeightAverage, clip_gradients, gated_step, make_optimizer


@dataclass
class Measured:
    """Bytes of one faked step."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    kept: int = 0
    """Live after the forward pass, beyond what was there before it."""
    attention: int = 0
    """Of it: queries, keys, values, results and log-sum-exps of attention."""
    peak: int = 0
    update_peak: int = 0
    at: str = field(default="")


def measure_step(
    model: ModelConfig,
    objective: ObjectiveConfig,
    images: int,
    *,
    precision: str = "fp32",
    recompute: str = "none",
    ema: bool = False,
    accumulation: int = 1,
    jitter: bool = False,
) -> Measured:
    """One step as the learner takes it (draws excepted), with the optimizer's moments made before."""
    with (
        mock.patch.dict(loss.CHUNK_BYTES, cpu=loss.CHUNK_BYTES["cuda"]),
        mock.patch.object(MaskedTokenViT, "reset_parameters"),  # reads values, which fake tensors have not
        FakeTensorMode(allow_non_fake_inputs=True),
        LiveBytes() as live,
    ):
        return _measure(model, objective, images, precision, recompute, ema, accumulation, jitter, live)


def _measure(model, objective, images, precision, recompute, ema, accumulation, jitter, live) -> Measured:
    measured = Measured()
    network = build_objective(objective, model, backend="sdpa", recompute=recompute)
    attention = AttentionBytes(network)
    optimizer = make_optimizer(network, OptimConfig())
    average = WeightAverage(network.model, 0.9) if ema else None
    measured.weights = _bytes(list(network.parameters()) + list(network.buffers()))
    measured.average = _bytes(average.weights.values()) if average else 0
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gated_step(optimizer, torch.zeros(()))  # makes the moments
    optimizer.zero_grad(set_to_none=True)
    live.peak = 0
    for _ in range(accumulation):
        _forward_backward(network, images, precision, jitter, live, measured, attention)
    measured.peak, measured.at = live.peak, live.at_peak
    live.peak = 0
    clip_gradients(network.parameters(), 1.0)
    gated_step(optimizer, torch.zeros(()))
    if average:
        average.update(network.model, torch.zeros(()))
    measured.update_peak = live.peak
    measured.gradients = _bytes(p.grad for p in network.parameters())
    measured.optimizer = _bytes(leaf for leaf in tree_leaves(optimizer.state_dict()) if isinstance(leaf, Tensor))
    return measured


class AttentionBytes:
    """Bytes that the attention of an objective keeps for its backward pass, by storage; none with recompute blocks.

    There the hooks of this class would take the place of those that keep nothing.
    """

    def __init__(self, network: Objective) -> None:
        self.kept: dict[int, int] = {}
        if network.model.recompute == "blocks":
            return
        attend = network.attention

        def attention(q: Tensor, kv: Tensor, layout) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x):
                return attend(q, kv, layout)

        network.attention = attention

    def _keep(self, tensor: Tensor) -> Tensor:
        self.kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor


def _forward_backward(
    network: Objective,
    images: int,
    precision: str,
    jitter: bool,
    live: LiveBytes,
    measured: Measured,
    attention: AttentionBytes,
) -> None:
    config = network.config
    pixels = torch.empty(images, 3, config.image_size, config.image_size, dtype=torch.uint8)
    tokens = torch.empty(images, config.patches, dtype=torch.int64)
    permutation = torch.empty(images, config.tokens, dtype=torch.int64)
    keep = torch.empty(config.depth, 2, images) if config.drop_path else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    before = live.live
    attention.kept.clear()
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        pictures = pixels.float() if jitter else pixels
        loss, _ = network(pictures, tokens, permutation, keep, False)
        del pictures
    measured.kept = live.live - before
    measured.attention = sum(attention.kept.values())
    loss.backward()
