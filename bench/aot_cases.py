"""Launches of the Triton kernels at named shapes, and the work that is in them. No tensor is ever read or written.

A case knows its launches for a target, and of those with products of tiles the `Work` from which floors follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import tile_count
from bench.attention_pass import VARIANTS, Pass
from bench.static_cost import Work
from bench.tile_count import Tiles
from mapet_kernels import launch
from mapet_kernels.kmeans_assign import triton_backend as assign
from mapet_kernels.kmeans_assign.passes import is_direct
from mapet_kernels.kmeans_update import triton_backend as update
from mapet_kernels.launch import Target
from mapet_kernels.prefix_suffix_attention import problem as prefix_suffix_problem
from mapet_kernels.prefix_suffix_attention import triton_backend as prefix_suffix
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.triton_launch import Launch
from mapet_kernels.two_stream_attention.tiles import Shape

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
"""By name; "tf32" is fp32 whose products are rounded to TF32."""

TWO_STREAM_VARIANTS = tuple(VARIANTS)
PREFIX_SUFFIX_VARIANTS = ("single", "single_per_image")
PROCESSORS = {80: 108, 90: 132}
"""Of an A100 and an H200."""


@dataclass(frozen=True)
class Attention:
    """One forward and backward pass of an attention op.

    variant: of two-stream attention see `attention_pass.VARIANTS`; of prefix-suffix attention, with the content
    stream's rows, "single" or "single_per_image".
    """

    batch: int = 256
    heads: int = 12
    tokens: int = 197
    cut: int = 50
    size: int = 64
    dtype: str = "bf16"
    variant: str = "plain"

    @property
    def described(self) -> str:
        """In words."""
        sizes = f"B x H = {self.batch} x {self.heads} = {self.batch * self.heads}, N = {self.tokens}, c = {self.cut}"
        op = "two-stream" if self.variant in VARIANTS else "prefix-suffix"
        return f"{op} attention, {self.variant}: {sizes}, D = {self.size}, {self.dtype}"

    @property
    def shape(self) -> TwoStreamShape:
        """As the registry has it."""
        options = VARIANTS.get(self.variant, {})
        return TwoStreamShape(self.tokens, self.cut, self.batch, self.heads, self.size, **options)

    def launches(self, target: Target) -> list[Launch]:
        """Forward, then the launches of the backward pass."""
        if self.variant in PREFIX_SUFFIX_VARIANTS:
            parts = self._prefix_suffix(target)
        else:
            per_image = self.variant == "gather"
            cut = _empty(self.batch, dtype=torch.int64) if per_image else None
            perm = _empty(self.batch, self.tokens, dtype=torch.int64) if per_image else None
            parts = Pass.make(self.shape, DTYPES[self.dtype], _empty, cut, perm).launches(target)
        if self.dtype == "tf32":  # what torch's setting on a GPU would ask for
            parts = [replace(part, constants=part.constants | {"PRECISION": "tf32"}) for part in parts]
        return parts

    def _prefix_suffix(self, target: Target) -> list[Launch]:
        rows, images = self.shape.tokens + self.shape.targets, (self.batch,) * (self.variant == "single_per_image")
        cut = _empty(*images, dtype=torch.int64) if images else self.cut
        problem = prefix_suffix_problem.Problem(
            _empty(*images, rows, dtype=torch.int64), cut, self.shape.targets, self.size**-0.5
        )
        sizes = (self.batch, rows, self.heads, self.size)
        q, out, d_out, dq, dk, dv = (_empty(*sizes, dtype=DTYPES[self.dtype]) for _ in range(6))
        k, v = _empty(*sizes[:2], 2, *sizes[2:], dtype=DTYPES[self.dtype]).unbind(2)
        forward = (q, k, v, out, _empty(*sizes[:3]))
        return [
            prefix_suffix.forward_launch(*forward, problem, target),
            *prefix_suffix.backward_launches(d_out, *forward, dq, dk, dv, problem, target),
        ]

    def tiles(self, part: Launch) -> Tiles:
        """What the programs of a launch of two-stream attention do for one image and head."""
        rows, keys = part.constants["BM"], part.constants["BN"]
        shape = Shape(self.tokens, self.cut, self.shape.with_content, self.shape.mask_tokens)
        if part.kernel.__name__.startswith("key"):
            skipped = part.arguments[part.kernel.arg_names.index("skipped")]
            return tile_count.by_key(shape, rows, keys, skipped)
        return tile_count.by_row(shape, rows, keys)

    def work(self, part: Launch) -> Work | None:
        """The work of a launch of two-stream attention; the tiles of the other op are not counted."""
        if self.variant not in VARIANTS:
            return None
        products, passing, staying, passing_statistics, staying_statistics = TRAFFIC[part.kernel.__name__]
        tiles, sets, spec = self.tiles(part), self.batch * self.heads, REGISTRY["two_stream_attention"]
        tile, flop = part.constants["BM"] * part.constants["BN"], 2 * products * launch.padded_size(self.size)
        row = self.size * DTYPES[self.dtype].itemsize
        moved = tiles.passing * (passing * row + passing_statistics * 4)
        moved += tiles.staying * (staying * row + staying_statistics * 4)
        return Work(
            visible=spec.cost(self.shape, torch.float16)[0] // (4 * self.size),
            executed=tiles.tiles * tile * sets,
            flop=flop,
            exp2=1,
            trips={"tile": tiles.tiles * sets},
            branches=tuple(count * sets for count in tiles.masks),
            trip_flop=flop * tile,
            l2=moved * sets,
            hbm=tensor_bytes(part),
        )


TRAFFIC = {
    "forward_kernel": (2, 2, 2, 0, 1),  # K, V; Q, O; LSE
    "query_gradient_kernel": (3, 2, 4, 0, 3),  # K, V; Q, dO, O, dQ; LSE, LSE in base 2, delta
    "key_gradient_kernel": (4, 2, 4, 2, 0),  # Q, dO; K, V, dK, dV; LSE in base 2, delta
}
"""Of an attention kernel: products of a tile; rows (D) that it moves for a passing and for a staying row; and its fp32
statistics for either."""


@dataclass(frozen=True)
class KMeans:
    """One call of kmeans_assign and, in the exact mode, of kmeans_update."""

    rows: int = 65536
    clusters: int = 8192
    features: int = 4096
    dtype: str = "bf16"
    exact: bool = True

    @property
    def variant(self) -> str:
        return "exact" if self.exact else "fast"

    @property
    def size(self) -> int:
        return self.features

    @property
    def described(self) -> str:
        """In words."""
        sizes = f"{self.rows} rows, {self.clusters} clusters, {self.features} features"
        return f"k-means, {self.variant}: {sizes}, {self.dtype}"

    def launches(self, target: Target) -> list[Launch]:
        """In the order of the call."""
        return [part for part in self._launches(target) if part is not None]

    def _launches(self, target: Target) -> Iterator[Launch | None]:
        dtype = DTYPES[self.dtype]
        x = _empty(1, self.rows, self.features, dtype=dtype)
        centroids = _empty(1, self.clusters, self.features)
        config = launch.kmeans_assign_scores(self.features, self.exact, target)
        direct = is_direct(x, self.exact, config)
        part, prepared = assign.centroids_launch(centroids, dtype, direct, config)
        yield part
        part, rows = assign.rows_launch(x, prepared, direct, self.exact, config)
        yield part
        processors = PROCESSORS.get(target.architecture, PROCESSORS[90])
        part, found = assign.scores_launch(rows, prepared, self.rows, self.exact, config, processors)
        yield part
        part, nearest, status = assign.merge_launch(found, config)
        yield part
        if self.exact:
            yield assign.decide_launch(x, centroids, nearest, status, found, nearest, config)
            yield assign.distances_launch(x, centroids, nearest)[0]
            order, first = (_empty(n, dtype=torch.int64) for n in (self.rows, self.clusters + 1))
            sums = _empty(self.clusters, self.features)
            yield from update.sums_launches(x[0], order, order.to(torch.int32), first, sums, add=True)

    def work(self, part: Launch) -> Work | None:
        """The work of the score kernel; None for the others, which only move memory."""
        if part.kernel.__name__ != "scores_kernel":
            return None
        rows, clusters, features = (part.constants[name] for name in ("BM", "BN", "BK"))
        products = -(-self.features // features)
        tiles = -(-self.rows // rows) * -(-self.clusters // clusters)
        return Work(
            visible=self.rows * self.clusters,
            executed=tiles * rows * clusters,
            flop=2 * products * features,
            exp2=0,
            trips={"tile": tiles, "product": tiles * products},
            branches=(),
            trip_flop=2 * rows * clusters * features,
            l2=2 * tiles * products * features * (clusters + (0 if products == 1 else rows)),
            hbm=tensor_bytes(part),
        )


CASES: dict[str, Attention | KMeans] = {
    "target": Attention(),
    "target_fp16": Attention(dtype="fp16"),
    "gather": Attention(variant="gather"),
    "last_block": Attention(variant="last_block"),
    "pim": Attention(variant="pim"),
    "prefix_suffix": Attention(variant="single"),
    "kmeans_exact": KMeans(),
    "kmeans_fast": KMeans(exact=False),
    "kmeans_narrow": KMeans(features=64),
}
"""The target: 3072 images x heads, 197 tokens of which 50 are not predicted, head size 64, bf16. k-means: the size of
k-CLIP, and one product a tile."""


def tensor_bytes(part: Launch) -> int:
    """Bytes of a launch's operands and results, each once."""
    values = (value.base if isinstance(value, TensorDescriptor) else value for value in part.arguments)
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in values if isinstance(x, Tensor)}.values())


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
