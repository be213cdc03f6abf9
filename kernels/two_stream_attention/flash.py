"""Two-stream attention composed exactly from FlashAttention calls, forward and backward.

With the keys laid out M, A, B every row sees one window of N keys (visibility.py), so each group of rows is one plain
call of a library (flash_providers.py) with its own backward pass, and no two results have to be merged:

    rows   keys it is given    window
    A, M   [0, N)              dense
    B      [1, N + T)          N keys, aligned to the bottom right: row i sees keys [i, i + N) of those given
    G      [0, N + T - 1)      the same

Without mask tokens (PIM) the keys are A, B:

    A      [0, c)              dense
    B      [0, N)              causal, aligned to the bottom right
    G      [0, N - 1)          the same; with c = 0 without G_0, which sees nothing

Calls. Rows are read where they stand, in four calls: A, M, B, G; three without mask tokens, one in the last block.
For B and G to share a call, K and V would have to be copied for each of them.

Copies. K and V are copied into the order M, A, B, once each; PIM copies nothing. Results are copied into the caller's
buffer, since no library writes there. With `perm` the copies of K and V gather from image order as well, and the
content rows are gathered too, so that M and A are one call. So it is with one cut per image: M_0 .. M_{T_b - 1}, A, B
come first and the padding last, where no real row's window reaches; then images of all cuts share three calls, and no
cut is read on the host. (PIM has no such order, and goes cut by cut.) Head sizes are padded to a multiple of 8.

A key's gradients from different calls are added in fp32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet_kernels import flash_providers
from mapet_kernels.flash_providers import CAUSAL, DENSE, HEAD_SIZE_MULTIPLE, MAX_HEAD_SIZE, Provider, Window
from mapet_kernels.two_stream_attention import by_cut
from mapet_kernels.two_stream_attention.problem import Problem, Streams


@dataclass(frozen=True)
class Call:
    """One call: rows of a stream, the keys they are given (in the order M, A, B), and which of those each row sees."""

    content: bool
    rows: slice
    keys: slice
    window: Window

    def of(self, streams: Streams) -> Tensor:
        """The call's rows of a quantity, (B, rows, ...)."""
        return (streams.content if self.content else streams.query)[:, self.rows]


@dataclass(frozen=True)
class Layout:
    """How content rows and keys come into the order of the calls; all None where slices of them are enough."""

    order: Tensor | None  # the row at each place, int64 (B, rows)
    places: Tensor | None  # the place of each row, int64 (B, rows)
    padding: Tensor | None  # True where a target of an image does not exist, (B, T); None with one cut for all


def forward(
    q: Streams, k: Tensor, v: Tensor, out: Streams, lse: Streams, problem: Problem, perm: Tensor | None = None
) -> None:
    """Fill `out` (B, rows, H, D) and `lse` (B, rows, H); content rows in permuted or, with `perm`, in image order."""
    provider = _provider(k)
    if isinstance(problem.cut, Tensor) and not problem.mask_tokens:
        by_cut.forward(forward, q, k, v, out, lse, problem, perm)
        return
    layout = _layout(problem, perm, k)
    q, k, v = _rows(q, layout), _keys(k, problem, layout), _keys(v, problem, layout)
    call_out, call_lse = _unordered(out, layout), _unordered(lse, layout)
    for call in calls(problem, q.content is not None, layout.order is not None):
        rows, row_lse = provider.forward(
            _ready(call.of(q)), k[:, call.keys], v[:, call.keys], call.window, problem.scale
        )
        target = call.of(call_out)
        target.copy_(rows[..., : target.shape[-1]])
        call.of(call_lse).copy_(row_lse[..., : rows.shape[1]].transpose(1, 2))
    _to_caller(call_out, out, layout, 0.0)
    _to_caller(call_lse, lse, layout, float("-inf"))
    if _first_target_is_blind(problem):
        out.query[:, 0], lse.query[:, 0] = 0.0, float("-inf")


def backward(
    d_out: Streams,
    q: Streams,
    k: Tensor,
    v: Tensor,
    out: Streams,
    lse: Streams,
    dq: Streams,
    dk: Tensor,
    dv: Tensor,
    problem: Problem,
    perm: Tensor | None = None,
) -> None:
    """Fill `dq` (content, query), `dk` and `dv`; `out` and `lse` are those of `forward`."""
    provider = _provider(k)
    if isinstance(problem.cut, Tensor) and not problem.mask_tokens:
        by_cut.backward(backward, d_out, q, k, v, out, lse, dq, dk, dv, problem, perm)
        return
    layout = _layout(problem, perm, k)
    d_out, q, out, lse = (_rows(streams, layout) for streams in (d_out, q, out, lse))
    k, v = _keys(k, problem, layout), _keys(v, problem, layout)
    size, work = dk.shape[-1], torch.promote_types(k.dtype, torch.float32)
    dk_sum, dv_sum = (torch.zeros(dk.shape, dtype=work, device=k.device) for _ in range(2))
    call_dq = _unordered(dq, layout)
    for call in calls(problem, q.content is not None, layout.order is not None):
        dq_rows, dk_keys, dv_keys = provider.backward(
            *(_ready(call.of(d_out)), _ready(call.of(q)), k[:, call.keys], v[:, call.keys], _ready(call.of(out))),
            *(call.of(lse).transpose(1, 2).contiguous(), call.window, problem.scale),
        )
        call.of(call_dq).copy_(dq_rows[..., :size])
        dk_sum[:, call.keys].add_(dk_keys[..., :size])
        dv_sum[:, call.keys].add_(dv_keys[..., :size])
    _to_caller(call_dq, dq, layout, 0.0)
    _keys_to_caller(dk_sum, dk, problem, layout)
    _keys_to_caller(dv_sum, dv, problem, layout)
    if _first_target_is_blind(problem):
        dq.query[:, 0] = 0.0


def calls(problem: Problem, with_content: bool, ordered: bool) -> list[Call]:
    """The calls that make up a problem; content rows are in the order M, A, B, padding if `ordered`, else A, B, M."""
    tokens, targets = problem.tokens, problem.targets
    rows = tokens + targets
    if not problem.mask_tokens:
        cut = problem.cut
        content = [
            Call(True, slice(0, cut), slice(0, cut), DENSE),
            Call(True, slice(cut, tokens), slice(0, tokens), CAUSAL),
        ]
        query = Call(False, slice(int(_first_target_is_blind(problem)), targets), slice(0, tokens - 1), CAUSAL)
    else:
        first, window = slice(0, tokens), Window(tokens - 1, 0)
        dense = [slice(0, tokens)] if ordered else [slice(0, problem.cut), slice(tokens, rows)]
        targets_rows = slice(tokens, rows) if ordered else slice(problem.cut, tokens)
        content = [Call(True, some, first, DENSE) for some in dense]
        content.append(Call(True, targets_rows, slice(1, rows), window))
        query = Call(False, slice(0, targets), slice(0, rows - 1), window)
    wanted = [*content, query] if with_content else [query]
    return [call for call in wanted if call.rows.start < call.rows.stop]


def _first_target_is_blind(problem: Problem) -> bool:
    """G_0 sees nothing without mask tokens and with cut 0."""
    return not problem.mask_tokens and problem.cut == 0


def _provider(k: Tensor) -> Provider:
    if k.shape[-1] > MAX_HEAD_SIZE:
        raise ValueError(f"backend 'flash' takes head sizes 1 to {MAX_HEAD_SIZE}, got {k.shape[-1]}")
    return flash_providers.provider_for(k.device, k.dtype)


def _layout(problem: Problem, perm: Tensor | None, k: Tensor) -> Layout:
    order, padding = _order(problem, perm, k), None
    if order is None:
        return Layout(None, None, None)
    if isinstance(problem.cut, Tensor):
        padding = torch.arange(problem.targets, device=k.device) >= (problem.tokens - problem.cut).unsqueeze(1)
    places = torch.arange(order.shape[1], device=k.device).expand_as(order)
    return Layout(order, torch.empty_like(order).scatter_(1, order, places), padding)


def _order(problem: Problem, perm: Tensor | None, k: Tensor) -> Tensor | None:
    """Content row at each place of the order M, A, B, padding, int64 (B, rows); None where slices are enough."""
    if perm is None and not isinstance(problem.cut, Tensor):
        return None
    if not problem.mask_tokens:
        return perm
    tokens, place = problem.tokens, torch.arange(problem.content_rows, device=k.device)  # (rows,)
    real_targets = (tokens - problem.cut).unsqueeze(1) if isinstance(problem.cut, Tensor) else problem.targets
    rank = (place - real_targets).expand(k.shape[0], -1)  # (B, rows)
    content = rank.clamp(0, tokens - 1)
    content = content if perm is None else perm.gather(1, content)
    # M_j is row N + j, and stands at place j; if it is padding, at place N + j.
    mask_token = torch.where(rank < 0, place + tokens, place)
    return torch.where((rank >= 0) & (rank < tokens), content, mask_token)


def _rows(streams: Streams, layout: Layout) -> Streams:
    """Streams in the order of the calls, padding rows 0."""
    content, query = streams.content, streams.query
    if content is not None and layout.order is not None:
        content = _clear(_gather(content, layout.order), layout, 0.0)
    return Streams(content, query if layout.padding is None else _clear(query.clone(), layout, 0.0))


def _keys(x: Tensor, problem: Problem, layout: Layout) -> Tensor:
    """Keys or values in the order M, A, B, padding 0, as the providers take them."""
    if layout.order is not None:
        # Padding must not hold NaN: what no row sees is still multiplied by a probability of 0.
        return _ready(_clear(_gather(x, layout.order), layout, 0.0))
    tokens = problem.tokens
    return _ready(torch.cat([x[:, tokens:], x[:, :tokens]], dim=1) if problem.mask_tokens else x)


def _keys_to_caller(x: Tensor, out: Tensor, problem: Problem, layout: Layout) -> None:
    """Write what belongs to keys in the order of the calls into `out`, in the caller's order."""
    if layout.places is not None:
        out.copy_(_gather(x, layout.places))
        return
    mask_keys = out.shape[1] - problem.tokens
    out[:, : problem.tokens] = x[:, mask_keys:]
    out[:, problem.tokens :] = x[:, :mask_keys]


def _unordered(out: Streams, layout: Layout) -> Streams:
    """Where the calls write: `out` itself, or other memory for content rows that are still to be put in order."""
    if layout.order is None or out.content is None:
        return out
    return Streams(torch.empty_like(out.content), out.query)


def _to_caller(written: Streams, out: Streams, layout: Layout, fill: float) -> None:
    """Put what the calls wrote into the caller's order, with `fill` in padding rows."""
    if out.content is not None and layout.places is not None:
        out.content.copy_(_gather(written.content, layout.places))
        _clear(out.content, layout, fill)
    _clear(out.query, layout, fill)


def _clear(x: Tensor, layout: Layout, fill: float) -> Tensor:
    """Fill the padding among the last T rows of x (B, rows, ...) in place: it stands there in every order."""
    if layout.padding is not None:
        padding = layout.padding.view(*layout.padding.shape, *(1 for _ in x.shape[2:]))
        x[:, x.shape[1] - padding.shape[1] :].masked_fill_(padding, fill)
    return x


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.view(*order.shape, *(1 for _ in x.shape[2:])).expand(*order.shape, *x.shape[2:]))


def _ready(x: Tensor) -> Tensor:
    """x (B, rows, H, D) with D a multiple of 8, contiguous in D, rows at multiples of 16 bytes; itself if it is so."""
    if x.shape[-1] % HEAD_SIZE_MULTIPLE:
        return F.pad(x, (0, -x.shape[-1] % HEAD_SIZE_MULTIPLE))
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
