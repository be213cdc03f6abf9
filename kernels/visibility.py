"""The prefix-suffix rule: who sees whom, as one integer per row.

Keys come in two runs: content keys, then suffix keys (MaPeT's mask tokens). A row with shift `s` and cut `c` sees

    content key j  if and only if  j < c + s        (a prefix that grows with s)
    suffix key j   if and only if  j >= s           (a suffix that shrinks with s)

MaPeT in permuted order has N content tokens, of which the first c are not predicted, and T = N - c targets:

    group  rows  shift   what it is
    A      c     0       content of the non-targets
    B_i    T     i + 1   content of target i, which sees itself
    M_j    T     0       mask token and position of target j, in the content stream
    G_i    T     i       query stream of target i, which does not see its own content

Laid out M, A, B instead of A, B, M, the keys that a row sees are one window of exactly N keys: [s, s + N).

Other instances: PIM (XLNet) has no suffix keys; masked image modelling and BEiT are s = 0 everywhere; a causal model is
c = 0, s = row + 1 without suffix keys; a prefix-LM is s = max(0, row + 1 - c).

Source: MaPeT, section 3 (Eq. 2 and 3), with the official code's convention that a query row sees its own mask token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def two_stream_shifts(tokens: int, cut: int, *, mask_tokens: bool = True, device=None) -> tuple[Tensor, Tensor]:
    """Shifts of the content stream's rows (A, B and, with mask_tokens, M) and of the query stream's rows (G).

    Returns int64 tensors of shapes (N + T,) or, without mask tokens, (N,); and (T,), with N = tokens, T = tokens - cut.
    """
    targets = tokens - cut
    rank = torch.arange(tokens, device=device)
    content = (rank - cut + 1).clamp(min=0)
    if mask_tokens:
        content = torch.cat([content, content.new_zeros(targets)])
    return content, torch.arange(targets, device=device)


def causal_shifts(tokens: int, *, device=None) -> Tensor:
    """Shifts (tokens,) of a causal model; use with cut = 0: row r sees content keys 0..r."""
    return torch.arange(1, tokens + 1, device=device)


def prefix_lm_shifts(tokens: int, prefix: int, *, device=None) -> Tensor:
    """Shifts (tokens,) of a prefix-LM; use with cut = prefix: the prefix sees itself whole, later rows see 0..r.

    Raises:
        ValueError: the prefix is not in [0, tokens].
    """
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix must be in [0, {tokens}], the number of tokens, got {prefix}")
    return (torch.arange(1, tokens + 1, device=device) - prefix).clamp(min=0)


def bidirectional_shifts(rows: int, *, device=None) -> Tensor:
    """Shifts (rows,) of masked image modelling: every row sees the first `cut` content keys and all suffix keys."""
    return torch.zeros(rows, dtype=torch.int64, device=device)


def prefix_suffix_mask(shift: Tensor, cut: int | Tensor, content_keys: int, suffix_keys: int = 0) -> Tensor:
    """Dense visibility, True where a row sees a key: for tests, pictures and the reference backend.

    Args:
        shift: integer shifts, (R,) or (B, R).
        cut: int, or (B,) integers.
        content_keys: number of content keys, C.
        suffix_keys: number of suffix keys, S.

    Returns:
        bool (R, C + S), or (B, R, C + S) where shift or cut has a batch dimension.
    """
    if isinstance(cut, Tensor):
        cut = cut.reshape(-1, 1, 1)
    shift = shift.unsqueeze(-1)  # (..., R, 1)
    content = torch.arange(content_keys, device=shift.device) < cut + shift  # (..., R, C)
    suffix = (torch.arange(suffix_keys, device=shift.device) >= shift).expand(*content.shape[:-1], -1)
    return torch.cat([content, suffix], dim=-1)


def two_stream_visibility(
    tokens: int, cut: int | Tensor, *, targets: int | None = None, mask_tokens: bool = True, device=None
) -> tuple[Tensor, Tensor]:
    """Dense visibility of both streams in permuted order, keys A, B, M.

    With one cut per image, image b has T_b = N - cut[b] targets in a buffer for `targets` of them; mask-token and query
    rows from T_b on are padding, which sees nothing and is seen by no one.

    Args:
        tokens: content tokens of an image, N.
        cut: int in [0, N], or integers (B,).
        targets: rows kept for targets, T; N - min(cut) when not given.
        mask_tokens: whether mask-token rows and keys exist (MaPeT) or not (PIM).

    Returns:
        (content, query): bool (N + T, N + T) and (T, N + T), with a leading B for a tensor of cuts; without mask tokens
        (N, N) and (T, N).
    """
    cuts = cut.reshape(-1, 1).to(torch.int64) if isinstance(cut, Tensor) else torch.tensor([[cut]], device=device)
    device = cuts.device
    if targets is None:
        targets = tokens - int(cuts.min())
    batch = cuts.shape[0]
    rank = torch.arange(tokens, device=device)
    target = torch.arange(targets, device=device)
    content_shift = (rank - cuts + 1).clamp(min=0)  # (B, N)
    if mask_tokens:
        content_shift = torch.cat([content_shift, content_shift.new_zeros(batch, targets)], dim=1)  # (B, N + T)
    query_shift = target.expand(batch, targets)
    suffix_keys = targets if mask_tokens else 0
    content = prefix_suffix_mask(content_shift, cuts, tokens, suffix_keys)
    query = prefix_suffix_mask(query_shift, cuts, tokens, suffix_keys)
    real = target < tokens - cuts  # (B, T)
    key_exists = torch.cat([real.new_ones(batch, tokens), real[:, :suffix_keys]], dim=1)  # (B, N + T)
    content &= key_exists.unsqueeze(1) & key_exists.unsqueeze(2)
    query &= key_exists.unsqueeze(1) & real.unsqueeze(2)
    return (content, query) if isinstance(cut, Tensor) else (content[0], query[0])


def to_image_order(mask: Tensor, perm: Tensor) -> Tensor:
    """Move the N content rows or keys of the last dimension from permuted order into image order.

    Args:
        mask: (..., N + anything); only the first N entries of the last dimension move.
        perm: (N,) integers; the token at rank r is perm[r].
    """
    out = mask.clone()
    out[..., perm] = mask[..., : perm.numel()]
    return out


def flex_mask_mod(shift: Tensor, cut: int, content_keys: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as a FlexAttention mask_mod(b, h, q_idx, kv_idx), for peers and for those who use FlexAttention.

    Args:
        shift: (R,) integers on the device of the attention.
        cut: the cutting point c.
        content_keys: number of content keys; key indices from there on are suffix keys.
    """

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        s = shift[q_idx]
        is_content = kv_idx < content_keys
        return (is_content & (kv_idx < cut + s)) | (~is_content & (kv_idx - content_keys >= s))

    return mask_mod
