"""Cross-entropy over the vocabulary of visual tokens without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Bytes of fp32 logits that exist at a time: what fits the caches of a CPU, or keeps a GPU busy."""

HAS_LIBRARY_LOSS = hasattr(torch.nn, "LinearCrossEntropyOptions")  # torch >= 2.14 with a chunked implementation


def token_cross_entropy(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(features weight^T + bias)[target], with fp32 statistics; the logits come in chunks of rows.

    torch.nn.functional.linear_cross_entropy does it where this torch chunks it, except in fp16: it forms gradients
    before loss scaling could reach them, where 1 / rows underflows.

    Args:
        features: (rows, D).
        weight: (vocabulary, D).
        bias: (vocabulary,).
        targets: int64 (rows,).

    Returns:
        scalar, fp32 or, for float64 features, float64.
    """
    rows = _chunk_rows(features, weight)
    if HAS_LIBRARY_LOSS and _matmul_dtype(features) != torch.float16:
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=rows, allow_retain_graph=torch.compiler.is_compiling()
        )
        return F.linear_cross_entropy(features, weight, targets, linear_bias=bias, options=options)
    total = sum(
        checkpoint(_summed, features[i : i + rows], weight, bias, targets[i : i + rows], use_reentrant=False)
        for i in range(0, features.shape[0], rows)
    )
    return total / features.shape[0]


def whole_cross_entropy(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """As `token_cross_entropy`, from all logits at once."""
    return _summed(features, weight, bias, targets) / features.shape[0]


@torch.no_grad()
def token_accuracy(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Share of rows whose largest logit is the target's: scalar fp32. Shapes as in `token_cross_entropy`."""
    rows = _chunk_rows(features, weight)
    correct = sum(
        (F.linear(features[i : i + rows], weight, bias).argmax(-1) == targets[i : i + rows]).sum()
        for i in range(0, features.shape[0], rows)
    )
    return correct.float() / features.shape[0]


def _chunk_rows(features: Tensor, weight: Tensor) -> int:
    return max(1, CHUNK_BYTES.get(features.device.type, CHUNK_BYTES["cpu"]) // (4 * weight.shape[0]))


def _matmul_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _summed(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(features, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
