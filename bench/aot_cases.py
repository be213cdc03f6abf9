"""Launches of the Triton kernels at named shapes, and the work that is in them. No tensor is ever read or written.

A case knows its launches for a target, and of each of them the `Work` from which floors follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import tile_count
from bench.sass import Code, Loop
from bench.static_cost import H200, Work, distinct, product_loops, tensor_floor
from bench.tile_count import Tiles
from mapet_kernels import launch, visibility
from mapet_kernels.kmeans_assign import triton_backend as assign
from mapet_kernels.kmeans_assign.passes import is_direct
from mapet_kernels.kmeans_update import triton_backend as update
from mapet_kernels.launch import Target
from mapet_kernels.prefix_suffix_attention import problem as prefix_suffix_problem
from mapet_kernels.prefix_suffix_attention import triton_backend as prefix_suffix
from mapet_kernels.triton_launch import Launch
from mapet_kernels.two_stream_attention import triton_backend as two_stream
from mapet_kernels.two_stream_attention.problem import Problem, Streams
from mapet_kernels.two_stream_attention.tiles import Shape

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
"""By name; "tf32" is fp32 whose products are rounded to TF32."""

TWO_STREAM_VARIANTS = ("plain", "gather", "last_block", "pim")
PREFIX_SUFFIX_VARIANTS = ("single", "single_per_image")
PROCESSORS = {80: 108, 90: 132}
"""Of an A100 and an H200."""


@dataclass(frozen=True)
class Attention:
    """One forward and backward pass of an attention op.

    variant: of two-stream attention "plain"; "gather" (image order and one cut per image); "last_block" (query stream
    only); "pim". Of prefix-suffix attention, with the content stream's rows, "single"; "single_per_image".
    """

    batch: int = 256
    heads: int = 12
    tokens: int = 197
    cut: int = 50
    size: int = 64
    dtype: str = "bf16"
    variant: str = "plain"

    @property
    def targets(self) -> int:
        return self.tokens - self.cut

    @property
    def mask_tokens(self) -> bool:
        return self.variant != "pim"

    @property
    def described(self) -> str:
        """In words."""
        op = "two-stream" if self.variant in TWO_STREAM_VARIANTS else "prefix-suffix"
        sizes = f"B x H = {self.batch} x {self.heads} = {self.batch * self.heads}, N = {self.tokens}, c = {self.cut}"
        return f"{op} attention, {self.variant}: {sizes}, D = {self.size}, {self.dtype}"

    def launches(self, target: Target) -> list[Launch]:
        """Forward, then the launches of the backward pass."""
        of_op = self._two_stream if self.variant in TWO_STREAM_VARIANTS else self._prefix_suffix
        parts = of_op(target)
        if self.dtype == "tf32":  # what torch's setting on a GPU would ask for
            parts = [replace(part, constants=part.constants | {"PRECISION": "tf32"}) for part in parts]
        return parts

    def _two_stream(self, target: Target) -> list[Launch]:
        cut: int | Tensor = self.cut
        perm = None
        if self.variant == "gather":
            cut = _empty(self.batch, dtype=torch.int64)
            perm = _empty(self.batch, self.tokens, dtype=torch.int64)
        problem = Problem(self.tokens, self.targets, cut, self.mask_tokens, self.size**-0.5)

        def streams() -> Streams:
            content = None if self.variant == "last_block" else self._rows(problem.content_rows)
            return Streams(content, self._rows(self.targets))

        q, out, d_out, dq = (streams() for _ in range(4))
        lse = Streams(*(None if x is None else _empty(*x.shape[:3]) for x in (out.content, out.query)))
        (k, v), (dk, dv) = (self._key_halves(problem.content_rows) for _ in range(2))
        return [
            two_stream.forward_launch(q, k, v, out, lse, problem, perm, target),
            *two_stream.backward_launches(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm, target),
        ]

    def _prefix_suffix(self, target: Target) -> list[Launch]:
        rows = self.tokens + self.targets
        shift, cut = _empty(rows, dtype=torch.int64), self.cut
        if self.variant == "single_per_image":
            shift, cut = _empty(self.batch, rows, dtype=torch.int64), _empty(self.batch, dtype=torch.int64)
        problem = prefix_suffix_problem.Problem(shift, cut, self.targets, self.size**-0.5)
        q, out, d_out, dq = (self._rows(rows) for _ in range(4))
        k, v = self._key_halves(rows)
        dk, dv = (self._rows(rows) for _ in range(2))
        lse = _empty(*out.shape[:3])
        return [
            prefix_suffix.forward_launch(q, k, v, out, lse, problem, target),
            *prefix_suffix.backward_launches(d_out, q, k, v, out, lse, dq, dk, dv, problem, target),
        ]

    def _rows(self, count: int) -> Tensor:
        """(B, count, H, D)."""
        return _empty(self.batch, count, self.heads, self.size, dtype=DTYPES[self.dtype])

    def _key_halves(self, count: int) -> tuple[Tensor, ...]:
        """Keys and values as one projection writes them: two (B, count, H, D) in one tensor."""
        return _empty(self.batch, count, 2, self.heads, self.size, dtype=DTYPES[self.dtype]).unbind(2)

    def tiles(self, part: Launch) -> Tiles:
        """What the programs of a launch do for one image and head."""
        rows, keys, by_key = part.constants["BM"], part.constants["BN"], part.kernel.__name__.startswith("key")
        if self.variant in PREFIX_SUFFIX_VARIANTS:
            seen = self._prefix_suffix_pairs()
            if by_key:
                return tile_count.prefix_suffix_by_key(seen, rows, keys)
            return tile_count.prefix_suffix_by_row(seen, self.tokens, rows, keys)
        if by_key:
            return tile_count.two_stream_by_key(self._shape(), rows, keys, argument(part, "skipped"))
        return tile_count.two_stream_by_row(self._shape(), rows, keys)

    def _prefix_suffix_pairs(self) -> np.ndarray:
        shift = visibility.two_stream_shifts(self.tokens, self.cut)[0].numpy()
        return tile_count.prefix_suffix(shift, self.cut, self.tokens, self.targets)

    def _shape(self) -> Shape:
        return Shape(self.tokens, self.cut, self.variant != "last_block", self.mask_tokens)

    def visible(self) -> int:
        """Pairs of a row and a key that it sees, of all images and heads."""
        if self.variant in PREFIX_SUFFIX_VARIANTS:
            pairs = self._prefix_suffix_pairs().sum()
        else:
            content, query = visibility.two_stream_visibility(self.tokens, self.cut, mask_tokens=self.mask_tokens)
            pairs = query.sum() + (0 if self.variant == "last_block" else content.sum())
        return int(pairs) * self.batch * self.heads

    def work(self, part: Launch) -> Work | None:
        """The work of a launch; None for the one that only lists tiles."""
        if part.kernel.__name__ not in ATTENTION_TRAFFIC:
            return None
        traffic, tiles, sets = ATTENTION_TRAFFIC[part.kernel.__name__], self.tiles(part), self.batch * self.heads
        row = launch.padded_size(self.size)
        bytes_of_row = self.size * DTYPES[self.dtype].itemsize
        moved = tiles.passing * (traffic.passing * bytes_of_row + traffic.passing_statistics * 4)
        moved += tiles.staying * (traffic.staying * bytes_of_row + traffic.staying_statistics * 4)
        return Work(
            visible=self.visible(),
            executed=tiles.tiles * part.constants["BM"] * part.constants["BN"] * sets,
            flop=2 * traffic.products * row,
            exp2=1,
            trips={"tile": tiles.tiles * sets},
            branches=tuple(count * sets for count in tiles.masks),
            trip_flop=2 * traffic.products * row * part.constants["BM"] * part.constants["BN"],
            l2=moved * sets,
            hbm=tensor_bytes(part),
        )

    def loops(self, code: Code) -> dict[str, Loop]:
        """The kernel's loops by the names that `Work.trips` has for them."""
        return product_loops(code)

    def one_pass(self) -> dict[str, float]:
        """Floors of a backward pass in one kernel that computes visible pairs alone, in microseconds.

        It has 5 products, and moves Q, O, dO, dQ, K, V, dK, dV and the LSE once.
        """
        content = 0 if self.variant == "last_block" else self.tokens + self.targets * self.mask_tokens
        rows = content + self.targets * (self.variant in TWO_STREAM_VARIANTS)
        keys = self.tokens + self.targets * self.mask_tokens
        moved = 4 * (rows + keys) * self.size * DTYPES[self.dtype].itemsize + 4 * rows
        return {
            "tensor cores": tensor_floor(self.visible(), 5 * 2 * launch.padded_size(self.size)),
            "HBM": round(1e6 * moved * self.batch * self.heads / H200.hbm, 2),
        }


@dataclass(frozen=True)
class Traffic:
    """Of an attention kernel: products of a tile; rows (D) and fp32 statistics that it moves for a passing and for a
    staying row."""

    products: int
    passing: int
    staying: int
    passing_statistics: int
    staying_statistics: int


ATTENTION_TRAFFIC = {
    "forward_kernel": Traffic(2, 2, 2, 0, 1),  # K, V; Q, O; LSE
    "query_gradient_kernel": Traffic(3, 2, 4, 0, 3),  # K, V; Q, dO, O, dQ; LSE, LSE in base 2, delta
    "key_gradient_kernel": Traffic(4, 2, 4, 2, 0),  # Q, dO; K, V, dK, dV; LSE in base 2, delta
}


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
        part, found = assign.scores_launch(
            rows, prepared, self.rows, self.exact, config, PROCESSORS.get(target.architecture, PROCESSORS[90])
        )
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

    def loops(self, code: Code) -> dict[str, Loop]:
        """The kernel's loops by the names that `Work.trips` has for them."""
        return product_loops(code)


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
    tensors = [_base(value) for value in part.arguments]
    return sum(x.numel() * x.element_size() for x in distinct([x for x in tensors if x is not None]))


def argument(part: Launch, name: str) -> Any:
    """The value of a launch's argument."""
    return part.arguments[part.kernel.arg_names.index(name)]


def _base(value: Any) -> Tensor | None:
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value if isinstance(value, Tensor) else None


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
