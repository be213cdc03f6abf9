"""Checks of what callers give to two-stream attention; every text says what was given and what is allowed."""

from __future__ import annotations

from torch import Tensor

from mapet_kernels.checks import (
    Shapes,
    advice_to_transpose,
    check_cut,
    check_device,
    check_is_tensor,
    check_permutations,
    check_scale,
    check_tensors,
    is_integer,
    is_readable,
)
from mapet_kernels.two_stream_attention.problem import Problem


def check(
    q_content: Tensor | None,
    q_query: Tensor,
    k: Tensor,
    v: Tensor,
    cut: int | Tensor,
    perm: Tensor | None,
    mask_tokens: bool,
    scale: float | None,
) -> Problem:
    """The problem these arguments pose, or ValueError / TypeError. See `two_stream_attention` for what is allowed."""
    given = {"q_query": q_query, "k": k, "v": v} | ({} if q_content is None else {"q_content": q_content})
    check_is_tensor(**given)
    if q_query.dim() != 4:
        raise ValueError(f"q_query must be (B, T, H, D), got {tuple(q_query.shape)}")
    batch, targets, _, size = q_query.shape
    cut = check_cut(cut, batch, q_query.device)
    values = cut if not isinstance(cut, Tensor) else cut.tolist() if is_readable(cut) else None
    shapes = {name: tensor.shape for name, tensor in given.items()}
    if (misfit := _misfit(shapes, values, mask_tokens)) is not None:
        advice = advice_to_transpose(shapes, lambda others: _misfit(others, values, mask_tokens))
        raise ValueError(f"{misfit}{advice}")
    check_tensors(**given)
    tokens = _tokens(k.shape[1], targets, mask_tokens)
    if perm is not None:
        _check_perm(perm, q_query, tokens)
    return Problem(tokens, targets, cut, mask_tokens, check_scale(scale, size))


def _check_perm(perm: Tensor, q_query: Tensor, tokens: int) -> None:
    check_is_tensor(perm=perm)
    expected = (q_query.shape[0], tokens)
    if perm.shape != expected or not is_integer(perm):
        raise ValueError(f"perm must be integers (B, N) = {expected}, got {perm.dtype} {tuple(perm.shape)}")
    check_device(q_query.device, perm=perm)
    check_permutations("perm", perm)


def _misfit(shapes: Shapes, cut: int | list[int] | None, mask_tokens: bool) -> str | None:
    """What keeps shapes and cuts (None where their values are not known) from fitting together, None where they fit."""
    q_query, k, v, q_content = (shapes.get(name) for name in ("q_query", "k", "v", "q_content"))
    batch, targets, heads, size = q_query
    if targets < 1:
        return "q_query has no rows: two-stream attention needs at least one target"
    if len(k) != 4 or k != v or (k[0], *k[2:]) != (batch, heads, size):
        return (
            f"k and v must both be ({batch}, rows, {heads}, {size}) like q_query {tuple(q_query)}, "
            f"got {tuple(k)} and {tuple(v)}"
        )
    if q_content is not None and q_content != k:
        return f"q_content must have the shape of k {tuple(k)}, got {tuple(q_content)}"
    return _misfit_of_cut(cut, k[1], targets, mask_tokens)


def _misfit_of_cut(cut: int | list[int] | None, rows: int, targets: int, mask_tokens: bool) -> str | None:
    tokens = _tokens(rows, targets, mask_tokens)
    if _cut_fits(cut, tokens, targets):
        return None
    sizes = f"N = {tokens} content tokens {'with' if mask_tokens else 'without'} mask tokens and {targets} query rows"
    if cut is None:
        text = f"k and v must have rows of content tokens, got {sizes}"
    elif isinstance(cut, list):
        least = max(0, tokens - targets)
        image = next(i for i, one in enumerate(cut) if not least <= one < tokens)
        text = f"every cut must be in [{least}, {tokens - 1}] for {sizes}, but image {image} has {cut[image]}"
    else:
        text = f"cut must be N - T = {tokens - targets} and in [0, N - 1] for {sizes}, got {cut}"
    if _cut_fits(cut, _tokens(rows, targets, not mask_tokens), targets):
        without = "without" if mask_tokens else "with"
        text += (
            f". The {rows} rows of k and v fit {without} mask-token rows: then mask_tokens={not mask_tokens} is needed"
        )
    return text


def _cut_fits(cut: int | list[int] | None, tokens: int, targets: int) -> bool:
    if cut is None:
        return tokens >= 1
    if isinstance(cut, list):
        return all(max(0, tokens - targets) <= one < tokens for one in cut)
    return 0 <= cut < tokens and cut + targets == tokens


def _tokens(rows: int, targets: int, mask_tokens: bool) -> int:
    """N, from the rows of k and v."""
    return rows - targets if mask_tokens else rows
