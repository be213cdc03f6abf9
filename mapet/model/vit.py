"""The pre-training network: a vision transformer over the flat token buffer, and the head that predicts visual tokens.

One set of weights serves every stream (paper, section 4.1), so the streams share one buffer (rows, D) and each layer is
one matrix product over all of it. Parameter names are the official ones. Shape letters: B images, N tokens, T targets,
D width, H heads, R rows of the buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mapet.config import ModelConfig, Recompute
from mapet.errors import CheckpointError
from mapet.model import stochastic_depth
from mapet.model.fp8 import fp8_linear
from mapet.model.stochastic_depth import Kept
from mapet.model.streams import StreamLayout
from mapet_kernels import permuted_embed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Attention = Callable[[Tensor, Tensor, StreamLayout], Tensor]
"""Maps q (R, H, d), kv (B, content_rows, 2, H, d) and the layout to (R, H, d); q may hold the predicted rows only."""

Keep: TypeAlias = Tensor | Sequence[tuple[Kept | None, Kept | None]]
"""What the branches of all blocks keep: factors (B, depth, 2), or for every block the images of its two branches."""


class LayerScale(nn.Module):
    """Holds gamma, one factor per channel of a branch; `Products.scaled` applies it."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))


class Products:
    """How a block's matrix products are done."""

    def __init__(self, fp8: bool) -> None:
        self.fp8 = fp8_linear() if fp8 else None

    def __call__(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """linear(x)."""
        return self.fp8(x, linear.weight, linear.bias) if self.fp8 else linear(x)

    def scaled(self, x: Tensor, linear: nn.Linear, scale: LayerScale) -> Tensor:
        """gamma * linear(x), with gamma folded into the weights.

        Scaling D x D weights instead of R x D activations saves three passes over them a branch, and keeping one for
        the gradient of gamma.
        """
        product = self.fp8 or F.linear
        return product(x, linear.weight * scale.gamma.unsqueeze(1), linear.bias * scale.gamma)


class StreamAttention(nn.Module):
    """Projections around an attention of the buffer's rows over the content stream's keys and values."""

    def __init__(self, width: int, heads: int, products: Products) -> None:
        super().__init__()
        self.heads, self.products = heads, products
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def queries(self, rows: Tensor) -> Tensor:
        """q (R, H, d) of rows (R, D)."""
        return self.products(rows, self.q).unflatten(1, (self.heads, -1))

    def keys_and_values(self, content: Tensor, layout: StreamLayout) -> Tensor:
        """kv (B, content_rows, 2, H, d) of content (B * content_rows, D)."""
        return self.products(content, self.kv).view(layout.batch, layout.content_rows, 2, self.heads, -1)

    def output(self, attended: Tensor, scale: LayerScale) -> Tensor:
        """The attention's result (R, H, d) projected to (R, D) and scaled."""
        return self.products.scaled(attended.flatten(1), self.proj, scale)


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), the exact GELU, in two halves; the result is scaled."""

    def __init__(self, width: int, hidden: int, products: Products) -> None:
        super().__init__()
        self.products = products
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def output(self, hidden: Tensor, scale: LayerScale) -> Tensor:
        """The scaled result from what fc1 returned."""
        return self.products.scaled(self.act(hidden), self.fc2, scale)


class Block(nn.Module):
    """Pre-norm transformer block whose modules all streams share; `keep` drops the branches of whole images."""

    def __init__(self, config: ModelConfig, fp8: bool) -> None:
        super().__init__()
        products = Products(fp8)
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = StreamAttention(config.width, config.heads, products)
        self.ls1 = LayerScale(config.width, config.layer_scale)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), products)
        self.ls2 = LayerScale(config.width, config.layer_scale)

    def forward(
        self,
        x: Tensor,
        layout: StreamLayout,
        keep: Tensor | tuple[Kept | None, Kept | None] | None,
        attention: Attention,
        predicted_only: bool,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Map the buffer (R, D) to (R, D), or to its predicted rows (B * T, D) where nothing else is needed any more.

        keep: what the attention and MLP branches keep: (2, B) factors that multiply every image, the images whose work
            is done, or None for all. recompute: see MaskedTokenViT.

        A region that is computed again ends in the product that keeps its input, for there the recomputation stops; so
        the last addition is outside.
        """
        keeps = (None, None) if keep is None else keep
        if isinstance(keep, Tensor):
            keeps = tuple(layout.per_row(factors, predicted_only) for factors in keep)
        arguments = (x, layout, *keeps, attention, predicted_only, recompute == "cheap")
        x, branch = _again(self._branches, *arguments) if recompute == "blocks" else self._branches(*arguments)
        return _add(x, branch, keeps[1], layout.groups(predicted_only))

    def _branches(
        self,
        x: Tensor,
        layout: StreamLayout,
        keep1: Tensor | Kept | None,
        keep2: Tensor | Kept | None,
        attention: Attention,
        predicted_only: bool,
        cheap: bool,
    ) -> tuple[Tensor, Tensor]:
        """x with the attention's branch added, and the MLP's branch."""
        rows, part = _kept_rows(x, keep1, layout.groups(False), layout)
        if cheap:
            # Two products end this region: their results are kept, as the attention keeps them anyway.
            q, kv = _again(self._queries_and_keys, rows, part, predicted_only, context_fn=_keep_products)
        else:
            q, kv = self._queries_and_keys(rows, part, predicted_only)
        if predicted_only:
            x = layout.predicted(x)
        attended = attention(q, kv, part)
        x = _add(x, self.attn.output(attended, self.ls1), keep1, layout.groups(predicted_only))
        rows, part = _kept_rows(x, keep2, layout.groups(predicted_only), layout)
        if not cheap:
            return x, self.mlp.output(self._hidden(rows), self.ls2)
        return x, _again(self.mlp.output, _again(self._hidden, rows), self.ls2)

    def _queries_and_keys(self, x: Tensor, layout: StreamLayout, predicted_only: bool) -> tuple[Tensor, Tensor]:
        h = _for_products(self.norm1(x))
        q = self.attn.queries(layout.predicted(h) if predicted_only else h)
        return q, self.attn.keys_and_values(layout.content(h), layout)

    def _hidden(self, x: Tensor) -> Tensor:
        return self.mlp.products(self.norm2(x), self.mlp.fc1)


def _again(function: Callable, *arguments: object, **options: object) -> Any:
    """function(*arguments), of which the backward pass keeps the arguments only. The function draws nothing random."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


def _policy(context: object, op: object, *arguments: object, **options: object) -> CheckpointPolicy:
    products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products = functools.partial(create_selective_checkpoint_contexts, _policy)


def _for_products(x: Tensor) -> Tensor:
    """x in the dtype that matrix products take under autocast, cast once and not by each of them."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _kept_rows(
    x: Tensor, keep: Tensor | Kept | None, groups: tuple[int, ...], layout: StreamLayout
) -> tuple[Tensor, StreamLayout]:
    """The rows of x whose branch is computed, and their layout."""
    if not isinstance(keep, Kept) or _keeps_all(keep, layout.batch):
        return x, layout
    return stochastic_depth.take(x, keep.images, groups), replace(layout, batch=keep.images.shape[0])


def _add(x: Tensor, branch: Tensor, keep: Tensor | Kept | None, groups: tuple[int, ...]) -> Tensor:
    """x plus what is kept of the branch, in x's dtype; keep is (R, 1) factors, or the images that the branch is of."""
    if keep is None:
        return x + branch
    if isinstance(keep, Tensor):
        return torch.addcmul(x, keep.to(x.dtype), branch.to(x.dtype))
    if _keeps_all(keep, x.shape[0] // sum(groups)):
        return torch.add(x, branch, alpha=keep.factor)
    return stochastic_depth.add(x, branch, keep, groups)


def _keeps_all(keep: Kept, images: int) -> bool:
    """Whether nothing is dropped."""
    return keep.images.shape[0] == images and keep.factor > 0


class PatchEmbed(nn.Module):
    """Holds the patch projection; `permuted_embed` applies it."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)


class MaskedTokenViT(nn.Module):
    """Vision transformer with a mask token and a head over the vocabulary of visual tokens.

    Args:
        config: sizes; the state dict's names and shapes follow the official MaPeT models.
        recompute: what the backward pass computes again: nothing, the norms and the GELU of a block ("cheap"; its
            matrix products and its attention are kept), or whole blocks ("blocks").
        fp8: whether matrix products of the blocks are in fp8.
    """

    def __init__(self, config: ModelConfig, *, recompute: Recompute = "none", fp8: bool = False) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, config.width))
        self.mask_positional_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.blocks = nn.ModuleList(Block(config, fp8) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.decoder = nn.Linear(config.width, config.vocabulary)
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD), persistent=False)
        self.register_buffer("drop_path_rates", drop_path_rates(config), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: deviation 0.02, zero biases, torch's default patch projection."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.mask_positional_token, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def embed(
        self,
        images: Tensor,
        permutation: Tensor,
        layout: StreamLayout,
        *,
        normalise: bool = True,
        backend: str = "auto",
    ) -> Tensor:
        """Flat buffer (R, D) of images (B, 3, S, S), uint8 or floating point in [0, 1], and permutations (B, N)."""
        return permuted_embed(
            images,
            self.patch_embed.proj.weight,
            self.patch_embed.proj.bias,
            self.pos_embed[0],
            self.mask_positional_token[0, 0],
            permutation,
            layout.cut,
            class_token=None if self.cls_token is None else self.cls_token[0, 0],
            mean=self.image_mean if normalise else None,
            std=self.image_std if normalise else None,
            target_content=layout.target_content,
            mask_tokens=layout.mask_tokens,
            query_stream=layout.query_stream,
            backend=backend,
        )

    def encode(self, x: Tensor, layout: StreamLayout, keep: Keep | None, attention: Attention) -> Tensor:
        """Normalised features (B * T, D) of the predicted rows from the buffer (R, D).

        keep: for every block what its branches keep, see Block; None drops nothing.

        The last block needs keys and values of the content stream, but no other of its outputs.
        """
        for i, block in enumerate(self.blocks):
            mine = None if keep is None else keep[:, i].T if isinstance(keep, Tensor) else keep[i]
            x = block(x, layout, mine, attention, i == len(self.blocks) - 1, self.recompute)
        return self.norm(x)


def drop_path_rates(config: ModelConfig) -> Tensor:
    """Probability of dropping the branches of each block, float32 (depth,): linear from 0 to config.drop_path."""
    return torch.linspace(0.0, config.drop_path, config.depth)


def load_official(model: MaskedTokenViT, state: dict[str, Tensor]) -> None:
    """Load a state dict with the official names; a "module." prefix is dropped.

    Raises:
        CheckpointError: names or shapes do not match; the text lists them.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"the weights do not fit this model: missing {missing}, unexpected {unexpected}, other shapes {shapes}"
        )
    model.load_state_dict(state)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(math.prod(p.shape) for p in model.parameters())
