"""One OpSpec per op: what the tests, the benchmarks and, later, the ahead-of-time compile check iterate over.

Adding an op means one folder and one entry here (CONTRIBUTING.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet_kernels import visibility
from mapet_kernels.backends import ATTENTION_BACKENDS
from mapet_kernels.kmeans_assign import kmeans_assign
from mapet_kernels.kmeans_update import kmeans_update
from mapet_kernels.permuted_embed import permuted_embed
from mapet_kernels.prefix_suffix_attention import prefix_suffix_attention
from mapet_kernels.two_stream_attention import two_stream_attention

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Arguments of one call. `inputs` are the floating-point tensors by keyword; those in `fixed` get no gradient."""

    inputs: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpSpec:
    """An op with everything needed to test and time it.

    name: also the op's folder and the stem of its benchmark.
    function: the public function; takes a case's inputs and options, and backend.
    plain: the op in a few lines of plain torch that autograd differentiates. In float64 it is the yardstick, in the
        case's own dtype the error budget.
    make_case: shape, dtype, device, seed -> Case.
    shapes: parameters of make_case, by a name that tests and records show.
    backends, gpu_backends: those that run anywhere, and those that need a CUDA device.
    cost: shape, dtype -> (FLOP, bytes) of the forward pass: visible pairs and compulsory traffic only.
    """

    name: str
    function: Callable[..., Any]
    plain: Callable[..., Any]
    make_case: Callable[..., Case]
    shapes: dict[str, Any]
    cost: Callable[[Any, torch.dtype], tuple[int, int]]
    backends: tuple[str, ...]
    gpu_backends: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    differentiable: bool = True


def _normal(generator: torch.Generator, dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(device, dtype)


def _integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def _permutations(generator: torch.Generator, batch: int, tokens: int, device: str) -> Tensor:
    return torch.rand(batch, tokens, generator=generator, device=generator.device).argsort(dim=1).to(device)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Masked attention as one writes it: q (B, R, H, D), k and v (B, K, H, D), visible (R, K) or (B, R, K)."""
    scores = torch.einsum("brhd,bkhd->bhrk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible.unsqueeze(-3), float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhrk,bkhd->brhd", weights, v)


@dataclass(frozen=True)
class TwoStreamShape:
    """N = tokens; `cuts` is one cut or one per image; the rest as in `two_stream_attention`."""

    tokens: int
    cuts: int | tuple[int, ...]
    batch: int = 2
    heads: int = 2
    size: int = 32
    mask_tokens: bool = True
    image_order: bool = False
    with_content: bool = True

    @property
    def targets(self) -> int:
        return self.tokens - (self.cuts if isinstance(self.cuts, int) else min(self.cuts))


def _two_stream_case(shape: TwoStreamShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    rows = shape.tokens + (shape.targets if shape.mask_tokens else 0)

    def tensor(rows: int) -> Tensor:
        return _normal(generator, dtype, device, shape.batch, rows, shape.heads, shape.size)

    inputs = {"q_content": tensor(rows)} if shape.with_content else {}
    inputs |= {"q_query": tensor(shape.targets), "k": tensor(rows), "v": tensor(rows)}
    cut = shape.cuts if isinstance(shape.cuts, int) else torch.tensor(shape.cuts, device=device)
    options: dict[str, Any] = {"cut": cut, "mask_tokens": shape.mask_tokens}
    if not shape.with_content:
        options["q_content"] = None
    if shape.image_order:
        options["perm"] = _permutations(generator, shape.batch, shape.tokens, device)
    return Case(inputs, options)


def _plain_two_stream(q_query, k, v, cut, *, q_content=None, mask_tokens=True, perm=None):
    targets = q_query.shape[1]
    tokens = k.shape[1] - targets if mask_tokens else k.shape[1]
    content, query = visibility.two_stream_visibility(
        tokens, cut, targets=targets, mask_tokens=mask_tokens, device=k.device
    )
    if perm is None:
        perm = torch.arange(tokens, device=k.device).expand(k.shape[0], -1)
    suffix = torch.arange(tokens, k.shape[1], device=k.device).expand(k.shape[0], -1)
    order = torch.cat([perm, suffix], dim=1)
    images = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
    k, v = k[images, order], v[images, order]
    out_query = plain_attention(q_query, k, v, query)
    if q_content is None:
        return None, out_query
    return plain_attention(q_content[images, order], k, v, content)[images, order.argsort(dim=1)], out_query


def _two_stream_cost(shape: TwoStreamShape, dtype: torch.dtype) -> tuple[int, int]:
    cuts = {shape.cuts: shape.batch} if isinstance(shape.cuts, int) else Counter(shape.cuts)
    pairs = keys = rows = 0
    for cut, images in cuts.items():
        targets = shape.tokens - cut
        content_rows = shape.tokens + (targets if shape.mask_tokens else 0)
        if shape.mask_tokens:
            query_pairs, content_pairs = targets * shape.tokens, content_rows * shape.tokens
        else:  # target i sees cut + i keys by its query, and itself too by its content
            query_pairs = targets * cut + targets * (targets - 1) // 2
            content_pairs = cut * cut + query_pairs + targets
        pairs += images * (query_pairs + (content_pairs if shape.with_content else 0))
        rows += images * (targets + (content_rows if shape.with_content else 0))
        keys += images * content_rows
    return 4 * pairs * shape.heads * shape.size, 2 * (rows + keys) * shape.heads * shape.size * dtype.itemsize


@dataclass(frozen=True)
class PrefixSuffixShape:
    """`shift` names a rule: causal, prefix_lm (prefix = cut), bidirectional, or random (with some blind rows)."""

    rows: int
    content_keys: int
    suffix_keys: int = 0
    cut: int = 0
    shift: str = "causal"
    per_image: bool = False
    batch: int = 2
    heads: int = 2
    size: int = 32


def _prefix_suffix_case(shape: PrefixSuffixShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    keys = shape.content_keys + shape.suffix_keys
    q, k, v = (
        _normal(generator, dtype, device, shape.batch, n, shape.heads, shape.size) for n in (shape.rows, keys, keys)
    )
    rules = {
        "causal": lambda: visibility.causal_shifts(shape.rows, device=device),
        "prefix_lm": lambda: visibility.prefix_lm_shifts(shape.rows, shape.cut, device=device),
        "bidirectional": lambda: visibility.bidirectional_shifts(shape.rows, device=device),
        "random": lambda: _integers(
            generator, -shape.cut - 2, shape.suffix_keys + 3, *(shape.batch, shape.rows)[not shape.per_image :]
        ).to(device),
    }
    options = {"shift": rules[shape.shift](), "cut": shape.cut, "suffix_keys": shape.suffix_keys}
    if shape.per_image:
        options["cut"] = _integers(generator, 0, shape.content_keys, shape.batch).to(device)
    return Case({"q": q, "k": k, "v": v}, options)


def _plain_prefix_suffix(q, k, v, shift, cut=0, *, suffix_keys=0):
    visible = visibility.prefix_suffix_mask(shift, cut, k.shape[1] - suffix_keys, suffix_keys)
    return plain_attention(q, k, v, visible)


def _prefix_suffix_cost(shape: PrefixSuffixShape, dtype: torch.dtype) -> tuple[int, int]:
    options = _prefix_suffix_case(shape, dtype).options
    visible = visibility.prefix_suffix_mask(options["shift"], options["cut"], shape.content_keys, shape.suffix_keys)
    pairs = int(visible.sum()) * (1 if visible.dim() == 3 else shape.batch)
    elements = 2 * shape.batch * (shape.rows + shape.content_keys + shape.suffix_keys) * shape.heads * shape.size
    return 4 * pairs * shape.heads * shape.size, elements * dtype.itemsize


@dataclass(frozen=True)
class PermutedEmbedShape:
    """Streams of MaPeT, PIM or MIM, by `objective`."""

    image_size: int
    patch_size: int
    width: int
    cut: int
    batch: int = 2
    class_token: bool = True
    objective: str = "mapet"
    uint8: bool = True

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + int(self.class_token)


def _permuted_embed_case(shape: PermutedEmbedShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    patches, width = shape.tokens - int(shape.class_token), shape.width
    pixels = _integers(generator, 0, 256, shape.batch, 3, shape.image_size, shape.image_size)
    order = _permutations(generator, shape.batch, patches, "cpu") + int(shape.class_token)
    inputs = {
        "weight": _normal(generator, dtype, device, width, 3, shape.patch_size, shape.patch_size) * 0.05,
        "bias": _normal(generator, dtype, device, width),
        "pos_embed": _normal(generator, dtype, device, shape.tokens, width),
        "mask_token": _normal(generator, dtype, device, width),
    }
    if shape.class_token:
        inputs["class_token"] = _normal(generator, dtype, device, width)
    if not shape.uint8:
        inputs["images"] = (pixels / 255).to(device, dtype)
    options = {
        "perm": F.pad(order, (int(shape.class_token), 0)).to(device),
        "cut": shape.cut,
        "mean": torch.tensor([0.485, 0.456, 0.406], device=device),
        "std": torch.tensor([0.229, 0.224, 0.225], device=device),
        "target_content": shape.objective != "mim",
        "mask_tokens": shape.objective != "pim",
        "query_stream": shape.objective != "mim",
    }
    if shape.uint8:
        options["images"] = pixels.to(device, torch.uint8)
    return Case(inputs, options, fixed=("images",))


def _plain_permuted_embed(
    images, weight, bias, pos_embed, mask_token, perm, cut, *, class_token=None, mean, std, target_content, mask_tokens,
    query_stream,
):  # fmt: skip
    dtype = weight.dtype
    images = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
    images = (images - mean.to(dtype).view(3, 1, 1)) / std.to(dtype).view(3, 1, 1)
    z = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)  # (B, P, D)
    if class_token is not None:
        z = torch.cat([class_token.expand(z.shape[0], 1, -1), z], dim=1)
    image = torch.arange(z.shape[0], device=z.device).unsqueeze(1)
    content = (z + pos_embed)[image, perm]
    masked = (mask_token + pos_embed)[perm[:, cut:]]
    parts = [content if target_content else content[:, :cut]] + [masked] * mask_tokens
    streams = [torch.cat(parts, dim=1).flatten(0, 1)] + [masked.flatten(0, 1)] * query_stream
    return torch.cat(streams)


def _permuted_embed_cost(shape: PermutedEmbedShape, dtype: torch.dtype) -> tuple[int, int]:
    columns = 3 * shape.patch_size**2
    patches = shape.tokens - int(shape.class_token)
    rows = shape.tokens + (shape.tokens - shape.cut) * (2 if shape.objective == "mapet" else 1)
    pixels = shape.batch * 3 * shape.image_size**2 * (1 if shape.uint8 else dtype.itemsize)
    flop = 2 * shape.batch * patches * columns * shape.width
    return flop, pixels + (shape.batch * rows + columns + shape.tokens) * shape.width * dtype.itemsize


@dataclass(frozen=True)
class KMeansShape:
    """n rows of D features, K clusters; groups > 0 is that many problems at once."""

    rows: int
    clusters: int
    features: int
    groups: int = 0


def _kmeans_assign_case(shape: KMeansShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    lead = (shape.groups,) if shape.groups else ()
    x = _normal(generator, dtype, device, *lead, shape.rows, shape.features).relu()  # like CLIP's features
    centroids = _normal(generator, dtype, device, *lead, shape.clusters, shape.features).relu()
    return Case({"x": x, "centroids": centroids}, {"return_distance": True}, fixed=("x", "centroids"))


def _plain_kmeans_assign(x, centroids, return_distance):
    distances = (x.unsqueeze(-2) - centroids.unsqueeze(-3)).square().sum(-1)
    smallest, ids = distances.min(-1)
    return ids, smallest


def _kmeans_assign_cost(shape: KMeansShape, dtype: torch.dtype) -> tuple[int, int]:
    groups = max(1, shape.groups)
    read = groups * (shape.rows + shape.clusters) * shape.features * dtype.itemsize
    return 2 * groups * shape.rows * shape.clusters * shape.features, read + 8 * groups * shape.rows


def _kmeans_update_case(shape: KMeansShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = _normal(generator, dtype, device, shape.rows, shape.features)
    ids = _integers(generator, 0, shape.clusters, shape.rows).to(device)
    return Case({"x": x}, {"ids": ids, "clusters": shape.clusters}, fixed=("x",))


def _plain_kmeans_update(x, ids, clusters):
    sums = torch.zeros(clusters, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return sums.index_add(0, ids, x.to(sums.dtype)), ids.bincount(minlength=clusters)


def _kmeans_update_cost(shape: KMeansShape, dtype: torch.dtype) -> tuple[int, int]:
    read = shape.rows * (shape.features * dtype.itemsize + 8)
    return shape.rows * shape.features, read + shape.clusters * (shape.features * 4 + 8)


REGISTRY: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec(
            name="two_stream_attention",
            function=two_stream_attention,
            plain=_plain_two_stream,
            make_case=_two_stream_case,
            shapes={
                "one_token": TwoStreamShape(1, 0),
                "one_target": TwoStreamShape(15, 14),
                "cut_1": TwoStreamShape(16, 1),
                "cut_0": TwoStreamShape(17, 0),
                "prime": TwoStreamShape(97, 41, heads=3, size=16),
                "vit": TwoStreamShape(197, 50, size=64),
                "long": TwoStreamShape(344, 103, batch=1, size=24),
                "cut_per_image": TwoStreamShape(23, (5, 9, 22, 5), batch=4),
                "image_order": TwoStreamShape(97, 30, image_order=True),
                "image_order_cut_per_image": TwoStreamShape(31, (30, 4, 11), batch=3, image_order=True),
                "last_block": TwoStreamShape(97, 30, with_content=False),
                "last_block_image_order": TwoStreamShape(31, 7, with_content=False, image_order=True),
                "pim": TwoStreamShape(97, 30, mask_tokens=False),
                "pim_blind_row": TwoStreamShape(17, 0, mask_tokens=False),
                "pim_last_block_blind_row": TwoStreamShape(17, 0, mask_tokens=False, with_content=False),
                "pim_cut_per_image": TwoStreamShape(23, (0, 9, 22), batch=3, mask_tokens=False, image_order=True),
            },
            cost=_two_stream_cost,
            backends=(*ATTENTION_BACKENDS, "matmul"),
            gpu_backends=("triton", "flash", "cuda"),
        ),
        OpSpec(
            name="prefix_suffix_attention",
            function=prefix_suffix_attention,
            plain=_plain_prefix_suffix,
            make_case=_prefix_suffix_case,
            shapes={
                "one_row": PrefixSuffixShape(1, 1),
                "causal": PrefixSuffixShape(97, 97),
                "prefix_lm": PrefixSuffixShape(97, 97, cut=31, shift="prefix_lm"),
                "mim": PrefixSuffixShape(197, 122, 75, cut=122, shift="bidirectional", size=64),
                "blind_rows": PrefixSuffixShape(41, 29, 13, cut=3, shift="random"),
                "per_image": PrefixSuffixShape(41, 29, 13, cut=3, shift="random", per_image=True, batch=3),
            },
            cost=_prefix_suffix_cost,
            backends=ATTENTION_BACKENDS,
            gpu_backends=("triton",),
        ),
        OpSpec(
            name="permuted_embed",
            function=permuted_embed,
            plain=_plain_permuted_embed,
            make_case=_permuted_embed_case,
            shapes={
                "small": PermutedEmbedShape(16, 4, 24, cut=5),
                "no_class_token": PermutedEmbedShape(16, 4, 24, cut=5, class_token=False),
                "float_images": PermutedEmbedShape(24, 8, 16, cut=1, uint8=False),
                "pim": PermutedEmbedShape(16, 4, 24, cut=5, objective="pim"),
                "pim_no_class_token": PermutedEmbedShape(16, 4, 24, cut=5, class_token=False, objective="pim"),
                "mim": PermutedEmbedShape(16, 4, 24, cut=16, objective="mim"),
                "vit_tiny": PermutedEmbedShape(224, 16, 192, cut=50),
            },
            cost=_permuted_embed_cost,
            backends=("reference",),
            gpu_backends=("triton", "cuda"),
        ),
        OpSpec(
            name="kmeans_assign",
            function=kmeans_assign,
            plain=_plain_kmeans_assign,
            make_case=_kmeans_assign_case,
            shapes={
                "one_row": KMeansShape(1, 1, 1),
                "prime": KMeansShape(97, 41, 13),
                "wide": KMeansShape(31, 19, 1024),
                "batched": KMeansShape(23, 7, 5, groups=3),
                "one_cluster": KMeansShape(19, 1, 64),
                "one_feature": KMeansShape(29, 17, 1),
                "many_clusters": KMeansShape(5, 523, 64),
            },
            cost=_kmeans_assign_cost,
            backends=("reference",),
            gpu_backends=("triton", "cuda"),
            differentiable=False,
        ),
        OpSpec(
            name="kmeans_update",
            function=kmeans_update,
            plain=_plain_kmeans_update,
            make_case=_kmeans_update_case,
            shapes={
                "one_row": KMeansShape(1, 1, 1),
                "prime": KMeansShape(97, 41, 13),
                "empty_clusters": KMeansShape(11, 64, 33),
                "long_clusters": KMeansShape(2003, 2, 7),
            },
            cost=_kmeans_update_cost,
            backends=("reference",),
            gpu_backends=("triton",),
            differentiable=False,
        ),
    )
}
"""All ops by name."""
