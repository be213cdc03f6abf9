"""The mask of a tile of targets: what their content and query rows see of the keys that the tile reads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mapet_kernels.dense_attention import attention_bias


def tile_mask(
    device: torch.device, dtype: torch.dtype, count: int, first: int, window: int, mask_tokens: bool, with_content: bool
) -> Tensor:
    """Additive mask (rows, first + window + count), the content rows of `count` targets and then their query rows.

    The first target has shift `first` among the tile's keys. On the CPU layers and steps share one mask, which nobody
    may change; on a GPU it is made anew, as other streams and recorded graphs could not use it.
    """
    make = _kept if device.type == "cpu" else _make
    return make(device, dtype, count, first, window, mask_tokens, with_content)


def _make(
    device: torch.device, dtype: torch.dtype, count: int, first: int, window: int, mask_tokens: bool, with_content: bool
) -> Tensor:
    key = torch.arange(first + window + count, device=device)
    shift = torch.arange(first, first + count, device=device).unsqueeze(1)
    shift = torch.cat([shift + 1, shift]) if with_content else shift
    visible = key < shift + window
    return attention_bias(visible & (key >= shift) if mask_tokens else visible, dtype)


_kept = functools.lru_cache(maxsize=32)(_make)
