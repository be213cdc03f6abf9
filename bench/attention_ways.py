"""Ways to compute two-stream attention: this project's backends and their peers, each in the layout that suits it.

A way is given its inputs in that layout, and its gradients are those of these inputs: nobody pays for moving rows. What
peers would need to bring their output back into rows for the next projection is not charged either.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.guard import Unavailable
from bench.official_way import batch_masks
from mapet_kernels import two_stream_attention_packed
from mapet_kernels.backends import TWO_STREAM_BACKENDS, available_backends
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.two_stream_attention.problem import Problem, split_flat
from mapet_kernels.visibility import flex_mask_mod, two_stream_shifts, two_stream_visibility

OURS = "ours_"


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
    def inputs(self) -> tuple[Tensor, ...]:
        """q_content, q_query, k, v."""
        return self.q_content, self.q_query, self.k, self.v

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of both outputs."""
        return self.d_content, self.d_query

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


@dataclass
class Way:
    """One way to attend over the operands.

    arrange: q_content, q_query, k, v as the operands have them -> the way's inputs, in its own layout.
    attend: those inputs -> outputs. This is what is timed.
    restore: outputs -> out_content, out_query as the operands are laid out. It and `arrange` can be differentiated.
    """

    operands: Operands
    arrange: Callable[..., tuple[Tensor, ...]]
    attend: Callable[..., tuple[Tensor, ...]]
    restore: Callable[..., tuple[Tensor, Tensor]]
    upstream: tuple[Tensor, ...] = field(default=(), init=False)

    @cached_property
    def leaves(self) -> tuple[Tensor, ...]:
        """The way's inputs, which get gradients."""
        return tuple(x.detach().requires_grad_() for x in self.arrange(*self.operands.inputs))

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs, with what the backward pass needs."""
        return self.attend(*self.leaves)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the leaves."""
        if not self.upstream:  # the operands' gradients, brought into the outputs' layout once
            laid_out = [o.detach().requires_grad_() for o in outputs]
            self.upstream = torch.autograd.grad(self.restore(*laid_out), laid_out, self.operands.gradients)
        return torch.autograd.grad(outputs, self.leaves, self.upstream)

    def results(self) -> tuple[Tensor, ...]:
        """Outputs and gradients as the operands are laid out: content, query; dq of both, dk, dv."""
        leaves = [x.detach().requires_grad_() for x in self.operands.inputs]
        outputs = self.restore(*self.attend(*self.arrange(*leaves)))
        gradients = torch.autograd.grad(outputs, leaves, self.operands.gradients)
        return (*(o.detach() for o in outputs), *gradients)


def own_backends() -> tuple[str, ...]:
    """Names of the backends of two-stream attention, whether or not they run here."""
    spec = REGISTRY["two_stream_attention"]
    return tuple(dict.fromkeys((*spec.backends, *spec.gpu_backends, *TWO_STREAM_BACKENDS)))


def ours(backend: str, operands: Operands) -> Way:
    """This project's op on the flat token buffer, as the model calls it."""
    reason = available_backends(operands.k.device, operands.k.dtype).get(backend)
    if reason is not None:
        raise Unavailable(reason)
    shape = operands.shape
    problem = Problem(shape.tokens, shape.targets, shape.cuts, True, 1.0)

    def arrange(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([q_content.flatten(0, 1), q_query.flatten(0, 1)]), torch.stack([k, v], dim=2)

    def attend(q: Tensor, kv: Tensor) -> tuple[Tensor]:
        return (two_stream_attention_packed(q, kv, shape.cuts, shape.targets, backend=backend),)

    def restore(out: Tensor) -> tuple[Tensor, Tensor]:
        streams = split_flat(out, shape.batch, problem, True)
        return streams.content, streams.query

    return Way(operands, arrange, attend, restore)


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, rows, H, D) as views (B, H, rows, D), and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def rows_at(x: Tensor, order: Tensor) -> Tensor:
    """x (B, rows, H, D) with row order[b, i] at place i."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), order]


def sdpa_mask(operands: Operands) -> Way:
    """torch's scaled_dot_product_attention, a call for each stream, one boolean mask for all images and heads."""
    shape = operands.shape
    masks = two_stream_visibility(shape.tokens, shape.cuts, device=operands.k.device)

    def attend(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        streams = zip((q_content, q_query), masks, strict=True)
        return tuple(F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for q, mask in streams)

    return Way(operands, heads_first, attend, heads_first)


def xformers_bias(operands: Operands) -> Way:
    """xformers' memory_efficient_attention, a call for each stream, with one dense additive bias for all images."""
    if importlib.util.find_spec("xformers") is None:
        raise Unavailable("the package xformers is not installed")
    if operands.k.device.type != "cuda":
        raise Unavailable("xformers needs a CUDA device")
    from xformers.ops import memory_efficient_attention

    shape, keys = operands.shape, operands.content_rows
    biases = []
    for visible in two_stream_visibility(shape.tokens, shape.cuts, device=operands.k.device):
        # Rows are padded to a multiple of 8 elements, since xformers asks for aligned ones.
        bias = operands.k.new_full((len(visible), -(-keys // 8) * 8), float("-inf"))
        bias[:, :keys].masked_fill_(visible, 0.0)
        biases.append(bias.expand(shape.batch, shape.heads, -1, -1)[..., :keys])

    def attend(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        streams = zip((q_content, q_query), biases, strict=True)
        return tuple(memory_efficient_attention(q, k, v, attn_bias=bias) for q, bias in streams)

    return Way(operands, lambda *inputs: inputs, attend, lambda *outputs: outputs)


@dataclass(frozen=True)
class FlexSetting:
    """How FlexAttention is called: both streams in one call or not, tiles tuned or torch's own, compiled or not."""

    one_call: bool = True
    autotune: bool = False
    compiled: bool = True

    @property
    def name(self) -> str:
        """Of the way with this setting."""
        calls = "one_call" if self.one_call else "two_calls"
        return f"flex_{calls}_128" + ("_autotuned" if self.autotune else "")


FLEX_SETTINGS = {
    setting.name: setting
    for autotune in (False, True)
    for setting in (FlexSetting(one_call, autotune) for one_call in (True, False))
}


def flex(setting: FlexSetting, operands: Operands) -> Way:
    """FlexAttention with a block mask of the same rule, one for all images and heads."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # here: it takes most of a second

    shape, device, keys = operands.shape, operands.k.device, operands.content_rows
    if device.type == "cpu" and setting.compiled:
        raise Unavailable("compiled FlexAttention has no backward pass on a CPU")
    mode = "max-autotune-no-cudagraphs" if setting.autotune else None
    call = torch.compile(flex_attention, dynamic=False, mode=mode) if setting.compiled else flex_attention
    shifts = two_stream_shifts(shape.tokens, shape.cuts, device=device)
    masks = [
        create_block_mask(
            flex_mask_mod(shift, shape.cuts, shape.tokens), None, None, shift.numel(), keys, device=device
        )
        for shift in ([torch.cat(shifts)] if setting.one_call else shifts)
    ]  # fmt: skip

    def arrange(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q = [torch.cat([q_content, q_query], dim=1)] if setting.one_call else [q_content, q_query]
        return heads_first(*q, k, v)

    def attend(*inputs: Tensor) -> tuple[Tensor, ...]:
        *queries, k, v = inputs
        pairs = zip(queries, masks, strict=True)
        return tuple(call(q, k, v, block_mask=mask) for q, mask in pairs)

    def restore(*outputs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat(heads_first(*outputs), dim=1).split([keys, shape.targets], dim=1)

    return Way(operands, arrange, attend, restore)


def official(operands: Operands, *, with_masks: bool) -> Way:
    """The official code's attention: tokens in image order, two dense passes with additive fp32 masks of every head.

    with_masks: whether building the masks on the host and moving them to the device is part of the forward pass.
    """
    shape, device = operands.shape, operands.k.device
    permutations = operands.permutation.cpu()

    def build() -> list[Tensor]:
        return [mask.to(device) for mask in batch_masks(permutations, shape.cuts, shape.heads)[:2]]

    one_head = () if with_masks else batch_masks(permutations, shape.cuts, 1)[:2]
    masks = [m.to(device).expand(-1, shape.heads, -1, -1).contiguous() for m in one_head]
    content, query = operands.order, operands.target_order

    def arrange(*inputs: Tensor) -> tuple[Tensor, ...]:
        return heads_first(*map(rows_at, inputs, (content, query, content, content)))

    def attend(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        streams = zip((q_content, q_query), build() if with_masks else masks, strict=True)
        return tuple(_dense(q, k, v, mask) for q, mask in streams)

    def restore(*outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(rows_at, heads_first(*outputs), (content.argsort(dim=1), query.argsort(dim=1))))

    return Way(operands, arrange, attend, restore)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


def builders() -> dict[str, Callable[[Operands], Way]]:
    """Every way by name; a builder raises Unavailable where the way does not run."""
    return {
        **{OURS + name: partial(ours, name) for name in own_backends()},
        "sdpa_mask": sdpa_mask,
        "xformers_bias": xformers_bias,
        **{name: partial(flex, setting) for name, setting in FLEX_SETTINGS.items()},
        "official": partial(official, with_masks=False),
        "official_with_masks": partial(official, with_masks=True),
    }
