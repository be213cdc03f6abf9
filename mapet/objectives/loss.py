"""Cross-entropy over the vocabulary of visual tokens without ever holding all logits.

For rows x, weight W and bias b of the head, with P = softmax(x W^T + b) and targets t of n rows:

    loss = -mean log P[i, t_i]      G = (P - onehot(t)) / n      dx = G W      dW = G^T x      db = colsum(G)

A chunk of rows has its logits once: their gradients are formed beside the loss, so that a step takes three matrix
products and nothing is computed again. torch.nn.functional.linear_cross_entropy goes the same way, but multiplies in
the dtype of its inputs whatever autocast says, returns the loss in it, and divides by n before a loss scale multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Bytes of fp32 logits that exist at a time: what fits the caches of a CPU, or keeps a GPU busy."""

_planned: ContextVar[str] = ContextVar("planned", default="")


@contextmanager
def chunks_as_on(kind: str) -> Iterator[None]:
    """Within: chunks are those of this kind of device, whatever holds the tensors: a CPU traces a GPU's step."""
    token = _planned.set(kind)
    try:
        yield
    finally:
        _planned.reset(token)


def chunk_bytes(device: torch.device) -> int:
    """CHUNK_BYTES of a device, or of the one that is planned for."""
    return CHUNK_BYTES.get(_planned.get() or device.type, CHUNK_BYTES["cpu"])


def token_cross_entropy(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(features weight^T + bias)[target], with fp32 statistics; the logits come in chunks of rows.

    Matrix products are in autocast's dtype; what they add up to over chunks, and the gradients, are in fp32.

    Args:
        features: (rows, D).
        weight: (vocabulary, D).
        bias: (vocabulary,).
        targets: int64 (rows,).

    Returns:
        scalar, fp32 or, for float64 features, float64.
    """
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(features, weight, bias, targets, _product_dtype(features))
    chunks = (_summed(features[part], weight, bias, targets[part]) for part in _chunks(features, weight))
    return sum(chunks) / features.shape[0]


@torch.no_grad()
def token_accuracy(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Share of rows whose largest logit is the target's: scalar fp32. Shapes as in `token_cross_entropy`."""
    correct = sum(
        (F.linear(features[part], weight, bias).argmax(-1) == targets[part]).sum() for part in _chunks(features, weight)
    )
    return correct.float() / features.shape[0]


class _ChunkedLoss(torch.autograd.Function):
    """The mean, and beside it the gradients of the sum; the backward pass multiplies them by what is left: 1 / n too.

    Kept are dx in the products' dtype, dW and db in fp32. In fp16 the sum's gradients do not underflow, where the
    mean's would.
    """

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        head = weight.to(dtype), bias.to(dtype)
        d_features = torch.empty_like(features, dtype=dtype)
        d_head = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
        loss = torch.zeros((), dtype=wide, device=features.device)
        for part in _chunks(features, weight):
            loss += _loss_and_gradients(features[part].to(dtype), *head, targets[part], d_features[part], *d_head)
        ctx.save_for_backward(d_features, *d_head)
        ctx.dtypes = features.dtype, weight.dtype, bias.dtype
        return loss / features.shape[0]

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        sums = ctx.saved_tensors
        scale = d_loss / sums[0].shape[0]
        # As many dimensions as the sum has, so that the product is in fp32.
        scaled = ((s * scale.reshape([1] * s.dim())).to(dtype) for s, dtype in zip(sums, ctx.dtypes, strict=True))
        return *scaled, None, None


def _loss_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dx: Tensor, d_weight: Tensor, d_bias: Tensor
) -> Tensor:
    """The sum of a chunk's losses; fills dx, adds to d_weight and d_bias. x, weight and bias have one dtype."""
    wide, at = d_weight.dtype, targets.unsqueeze(1)
    logits = torch.addmm(bias, x, weight.t())
    p = logits.softmax(1, dtype=wide)
    # The largest p is never small, so that its logarithm is as good as that of the sum of exponentials, and free.
    log_sum_exp = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
    loss = (log_sum_exp - logits.gather(1, at)).sum()
    d_logits = p.scatter_(1, at, p.gather(1, at) - 1)
    d_bias += d_logits.sum(0)
    if x.dtype == wide:
        torch.addmm(d_weight, d_logits.t(), x, out=d_weight)
    else:
        d_logits = logits.copy_(d_logits)
        d_weight += d_logits.t() @ x
    torch.mm(d_logits, weight, out=dx)
    return loss


def _chunks(features: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, chunk_bytes(features.device) // (4 * weight.shape[0]))
    for first in range(0, features.shape[0], size):
        yield slice(first, min(first + size, features.shape[0]))


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _summed(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(features, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
