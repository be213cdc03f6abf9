"""Ways to compute two-stream attention: this project's backends and their peers, each in the layout that suits it.

A way is given its inputs in that layout, and its gradients are those of these inputs: nobody pays for moving rows. What
peers would need to bring their output back into rows for the next projection is not charged either.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.guard import Unavailable
from bench.official_way import batch_masks
from mapet_kernels import two_stream_attention, two_stream_attention_packed
from mapet_kernels.backends import TWO_STREAM_BACKENDS, available_backends
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.two_stream_attention.problem import Problem, split_flat
from mapet_kernels.visibility import flex_mask_mod, two_stream_shifts, two_stream_visibility

OURS = "ours_"
IMAGE_ORDER = "_image_order"


@dataclass(frozen=True)
class Operands:
    """Inputs and output gradients, content rows in permuted order: (B, rows, H, D); permutation (B, N)."""

    shape: TwoStreamShape
    q_content: Tensor
    q_query: Tensor
    k: Tensor
    v: Tensor
    d_content: Tensor
    d_query: Tensor
    permutation: Tensor

    @property
    def content_rows(self) -> int:
        """N + T."""
        return self.k.shape[1]

    @cached_property
    def order(self) -> Tensor:
        """(B, N + T): the permuted row at each place of image order, for tokens and then for mask tokens."""
        targets = self.target_order + self.shape.tokens
        return torch.cat([self.permutation.argsort(dim=1), targets], dim=1)

    @cached_property
    def target_order(self) -> Tensor:
        """(B, T): the target at each place when targets stand as in the image."""
        return self.permutation[:, self.shape.cuts :].argsort(dim=1)


def random_operands(shape: TwoStreamShape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Operands:
    """Standard normal inputs and gradients for MaPeT with one cut, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = shape.tokens + shape.targets

    def tensor(rows: int) -> Tensor:
        size = (shape.batch, rows, shape.heads, shape.size)
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    permutation = torch.rand(shape.batch, shape.tokens, generator=generator, device=device).argsort(dim=1)
    lengths = (rows, shape.targets, rows, rows, rows, shape.targets)
    return Operands(shape, *map(tensor, lengths), permutation)


Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Way:
    """One way with its inputs.

    leaves: inputs that get gradients, in the way's layout.
    attend: leaves -> outputs.
    upstream: gradients of the outputs, in the outputs' layout.
    collect: (outputs, gradients) -> results in the order and layout of the operands: out_content, out_query,
        dq_content, dq_query, dk, dv.
    """

    leaves: tuple[Tensor, ...]
    attend: Callable[..., tuple[Tensor, ...]]
    upstream: tuple[Tensor, ...]
    collect: Callable[[Results, Results], Results]

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs, with what the backward pass needs."""
        return self.attend(*self.leaves)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the leaves."""
        return torch.autograd.grad(outputs, self.leaves, self.upstream)

    def results(self) -> Results:
        """Outputs and gradients as the operands are laid out."""
        outputs = self.forward()
        gradients = self.backward(outputs)
        return self.collect(tuple(o.detach() for o in outputs), gradients)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def own_backends() -> tuple[str, ...]:
    """Names of the backends of two-stream attention, whether or not they run here."""
    spec = REGISTRY["two_stream_attention"]
    return tuple(dict.fromkeys((*spec.backends, *spec.gpu_backends, *TWO_STREAM_BACKENDS)))


def _require(backend: str, operands: Operands) -> None:
    reason = available_backends(operands.k.device, operands.k.dtype).get(backend)
    if reason is not None:
        raise Unavailable(reason)


def ours(backend: str, operands: Operands) -> Way:
    """This project's op on the flat token buffer, as the model calls it."""
    _require(backend, operands)
    shape = operands.shape
    q, upstream = (
        torch.cat([content.flatten(0, 1), query.flatten(0, 1)])
        for content, query in ((operands.q_content, operands.q_query), (operands.d_content, operands.d_query))
    )
    problem = Problem(shape.tokens, shape.targets, shape.cuts, True, 1.0)

    def attend(q: Tensor, kv: Tensor) -> tuple[Tensor]:
        return (two_stream_attention_packed(q, kv, shape.cuts, shape.targets, backend=backend),)

    def collect(outputs: Results, gradients: Results) -> Results:
        out, dq = (split_flat(x, shape.batch, problem, True) for x in (outputs[0], gradients[0]))
        return out.content, out.query, dq.content, dq.query, *gradients[1].unbind(2)

    leaves = _leaf(q), _leaf(torch.stack([operands.k, operands.v], dim=2))
    return Way(leaves, attend, (upstream,), collect)


def ours_unpacked(backend: str, operands: Operands, *, image_order: bool) -> Way:
    """This project's op on separate streams, content rows in permuted or (gathered by the op) in image order."""
    _require(backend, operands)
    shape = operands.shape
    perm = operands.permutation if image_order else None
    ranks = torch.arange(operands.content_rows, device=operands.k.device)
    mask_rows = ranks[shape.tokens :].expand(shape.batch, -1)
    # M rows stay in target order: only tokens move.
    order = torch.cat([operands.permutation.argsort(dim=1), mask_rows], dim=1)

    def moved(x: Tensor) -> Tensor:
        return _rows(x, order) if image_order else x

    def attend(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return two_stream_attention(q_content, q_query, k, v, shape.cuts, perm=perm, backend=backend)

    def collect(outputs: Results, gradients: Results) -> Results:
        out_content, dq_content, dk, dv = (outputs[0], gradients[0], *gradients[2:])
        if image_order:
            back = order.argsort(dim=1)
            out_content, dq_content, dk, dv = (_rows(x, back) for x in (out_content, dq_content, dk, dv))
        return out_content, outputs[1], dq_content, gradients[1], dk, dv

    leaves = moved(operands.q_content), operands.q_query, moved(operands.k), moved(operands.v)
    return Way(tuple(map(_leaf, leaves)), attend, (moved(operands.d_content), operands.d_query), collect)


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """x (B, rows, H, D) with row order[b, i] at place i."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), order]


def _heads_first(operands: Operands) -> tuple[Tensor, ...]:
    """Leaves q_content, q_query, k, v as views (B, H, rows, D)."""
    return tuple(_leaf(x.transpose(1, 2)) for x in (operands.q_content, operands.q_query, operands.k, operands.v))


def _collect_heads_first(outputs: Results, gradients: Results) -> Results:
    return tuple(x.transpose(1, 2) for x in (*outputs, *gradients))


def sdpa_mask(operands: Operands) -> Way:
    """torch's scaled_dot_product_attention, a call for each stream, one boolean mask for all images and heads."""
    shape = operands.shape
    content_mask, query_mask = two_stream_visibility(shape.tokens, shape.cuts, device=operands.k.device)

    def attend(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (
            F.scaled_dot_product_attention(q_content, k, v, attn_mask=content_mask),
            F.scaled_dot_product_attention(q_query, k, v, attn_mask=query_mask),
        )

    upstream = operands.d_content.transpose(1, 2), operands.d_query.transpose(1, 2)
    return Way(_heads_first(operands), attend, upstream, _collect_heads_first)


def xformers_bias(operands: Operands) -> Way:
    """xformers' memory_efficient_attention, a call for each stream, with one dense additive bias for all images."""
    if importlib.util.find_spec("xformers") is None:
        raise Unavailable("the package xformers is not installed")
    if operands.k.device.type != "cuda":
        raise Unavailable("xformers needs a CUDA device")
    from xformers.ops import memory_efficient_attention

    shape, dtype = operands.shape, operands.k.dtype
    masks = two_stream_visibility(shape.tokens, shape.cuts, device=operands.k.device)
    biases = [_padded_bias(mask, dtype).expand(shape.batch, shape.heads, -1, -1) for mask in masks]

    def attend(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        content, query = (bias[..., : k.shape[1]] for bias in biases)
        return (
            memory_efficient_attention(q_content, k, v, attn_bias=content),
            memory_efficient_attention(q_query, k, v, attn_bias=query),
        )

    leaves = tuple(map(_leaf, (operands.q_content, operands.q_query, operands.k, operands.v)))
    return Way(
        leaves, attend, (operands.d_content, operands.d_query), lambda outputs, gradients: (*outputs, *gradients)
    )


def _padded_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible and -inf elsewhere, rows padded to a multiple of 8 elements: xformers asks for aligned rows."""
    rows, keys = visible.shape
    bias = torch.full((rows, -(-keys // 8) * 8), float("-inf"), dtype=dtype, device=visible.device)
    bias[:, :keys].masked_fill_(visible, 0.0)
    return bias


@dataclass(frozen=True)
class FlexSetting:
    """How FlexAttention is called: sparse block size, both streams in one call or not, and how it is compiled."""

    block: int = 128
    one_call: bool = True
    autotune: bool = False
    compiled: bool = True

    @property
    def name(self) -> str:
        """Of the way with this setting."""
        calls = "one_call" if self.one_call else "two_calls"
        return f"flex_{calls}_{self.block}" + ("_autotuned" if self.autotune else "")

    @property
    def kernel_options(self) -> dict[str, int] | None:
        """Tiles that divide the block; torch's own choice for blocks of 128 or when it tunes them."""
        if self.autotune or self.block >= 128:
            return None
        small, large = self.block // 2, self.block
        return {
            "BLOCK_M": large, "BLOCK_N": large,
            "BLOCK_M1": small, "BLOCK_N1": large, "BLOCK_M2": large, "BLOCK_N2": small,
        }  # fmt: skip


FLEX_SETTINGS = {
    setting.name: setting
    for setting in (
        *(FlexSetting(block, one_call) for block in (128, 64) for one_call in (True, False)),
        *(FlexSetting(128, one_call, autotune=True) for one_call in (True, False)),
    )
}


def flex(setting: FlexSetting, operands: Operands) -> Way:
    """FlexAttention with a block mask of the same rule, one for all images and heads."""
    from torch.nn.attention.flex_attention import flex_attention  # here, as it takes most of a second

    shape, device = operands.shape, operands.k.device
    if device.type == "cpu" and setting.compiled:
        raise Unavailable("compiled FlexAttention has no backward pass on a CPU")
    mode = "max-autotune-no-cudagraphs" if setting.autotune else None
    call = torch.compile(flex_attention, dynamic=False, mode=mode) if setting.compiled else flex_attention
    shifts = two_stream_shifts(shape.tokens, shape.cuts, device=device)
    leaves = _heads_first(operands)
    upstream = operands.d_content.transpose(1, 2), operands.d_query.transpose(1, 2)
    masks = [_block_mask(s, operands, setting.block) for s in ((torch.cat(shifts),) if setting.one_call else shifts)]
    attend_one = partial(_flex_call, call, setting.kernel_options)
    if not setting.one_call:

        def attend(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attend_one(q_content, k, v, masks[0]), attend_one(q_query, k, v, masks[1])

        return Way(leaves, attend, upstream, _collect_heads_first)

    q = _leaf(torch.cat([operands.q_content, operands.q_query], dim=1).transpose(1, 2))
    both = torch.cat([operands.d_content, operands.d_query], dim=1).transpose(1, 2)

    def attend_both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (attend_one(q, k, v, masks[0]),)

    def collect(outputs: Results, gradients: Results) -> Results:
        split = [
            x.transpose(1, 2).split([operands.content_rows, shape.targets], dim=1) for x in (*outputs, gradients[0])
        ]
        return (*split[0], *split[1], *(x.transpose(1, 2) for x in gradients[1:]))

    return Way((q, *leaves[2:]), attend_both, (both,), collect)


def _flex_call(call, kernel_options, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    return call(q, k, v, block_mask=mask, kernel_options=kernel_options)


def _block_mask(shift: Tensor, operands: Operands, block: int):
    from torch.nn.attention.flex_attention import create_block_mask

    mask_mod = flex_mask_mod(shift, operands.shape.cuts, operands.shape.tokens)
    rows, keys = shift.numel(), operands.content_rows
    return create_block_mask(mask_mod, None, None, rows, keys, device=shift.device, BLOCK_SIZE=block)


def official(operands: Operands, *, with_masks: bool) -> Way:
    """The official code's attention: tokens in image order, two dense passes with additive fp32 masks of every head.

    with_masks: whether building the masks on the host and moving them to the device is part of the forward pass.
    """
    shape, device = operands.shape, operands.k.device
    permutations = operands.permutation.cpu()

    def build() -> tuple[Tensor, Tensor]:
        content, query, _ = batch_masks(permutations, shape.cuts, shape.heads)
        return content.to(device), query.to(device)

    one_head = () if with_masks else batch_masks(permutations, shape.cuts, 1)[:2]
    masks = [m.to(device).expand(-1, shape.heads, -1, -1).contiguous() for m in one_head]

    def attend(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        content_mask, query_mask = build() if with_masks else masks
        return _dense(q_content, k, v, content_mask), _dense(q_query, k, v, query_mask)

    def arranged(content: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return (_rows(content, operands.order).transpose(1, 2), _rows(query, operands.target_order).transpose(1, 2))

    def collect(outputs: Results, gradients: Results) -> Results:
        content, query = operands.order.argsort(dim=1), operands.target_order.argsort(dim=1)
        back = (content, query, content, query, content, content)
        return tuple(_rows(x.transpose(1, 2), order) for x, order in zip((*outputs, *gradients), back, strict=True))

    leaves = (
        *arranged(operands.q_content, operands.q_query),
        *(_rows(x, operands.order).transpose(1, 2) for x in (operands.k, operands.v)),
    )
    return Way(tuple(map(_leaf, leaves)), attend, arranged(operands.d_content, operands.d_query), collect)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


def builders() -> dict[str, Callable[[Operands], Way]]:
    """Every way by name; a builder raises Unavailable where the way does not run."""
    own = own_backends()
    return {
        **{OURS + name: partial(ours, name) for name in own},
        **{f"{OURS}{name}_unpacked": partial(ours_unpacked, name, image_order=False) for name in own},
        **{f"{OURS}{name}{IMAGE_ORDER}": partial(ours_unpacked, name, image_order=True) for name in own},
        "sdpa_mask": sdpa_mask,
        "xformers_bias": xformers_bias,
        **{name: partial(flex, setting) for name, setting in FLEX_SETTINGS.items()},
        "official": partial(official, with_masks=False),
        "official_with_masks": partial(official, with_masks=True),
    }
