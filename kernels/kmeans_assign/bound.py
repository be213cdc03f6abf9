"""What the tensor-core backends compute, the error bound that makes their ids exact, and its preparation in torch.

What is computed. For any vector m, argmin_k |x - c_k|^2 = argmin_k S_k with

    S_k = b_k - 2 x.(c_k - m),         b_k = |c_k - m|^2 + 2 m.(c_k - m)        for rows as they are, or
    S_k = b_k - 2 (x - m).(c_k - m),   b_k = |c_k - m|^2                        for centred rows;

|x|^2 is the same for every k and is left out. m is the mean centroid, so that what all centroids have in common costs
no digits. Float16 rows are used as they lie in memory, bfloat16 rows as float16 copies, which but for the range hold
all their digits, float32 rows as centred float16 copies: float16 keeps the 11 bits that TF32 keeps, at twice its
speed, as each copied row is first multiplied by a power of two W of its own. The centroids are copied once a call,
times one power of two P. With X = round(W x) (or round(W (x - m))), C_k = round(P (c_k - m)) and the tensor cores'
X.C_k, the score is P^2 b_k - 2 (P / W) X.C_k, about P^2 S_k.

The bound. Everything is scaled as said. Let d_k = C_k - P (c_k - m), known exactly, and R = X - W x, known too. Then

    |score_k - P^2 S_k| <= r a_k + z_k,
    r = 2 (P / W) max(|X|, |R| / q),   a_k = |d_k| + (q + g + 16 u) n_k,   n_k = |C_k| + |d_k| >= |P (c_k - m)|,
    z_k = 16 u |P^2 b_k| + 2^-36 B_k + 2^-100,

by Cauchy-Schwarz for the rounding of the operands (X.d_k and R.(c_k - m)); q = 2^-12 for copied rows, else 0 as R = 0;
u = 2^-24 for fewer than 16 fp32 roundings on the way from X.C_k to the number that is compared; B_k, the sum of the
magnitudes of the terms of P^2 b_k, for its float64 sum; 2^-100 for underflow. Norms are widened by 2^-9 for their own
rounding. g bounds the tensor cores' sum of D (padded) exact products, |X.C_k - computed| <= g |X| |C_k|.

What is assumed of tensor cores: one instruction adds t >= 4 exact products and the accumulator after cutting (not
rounding) each off at 2^-23 of the largest one's power of two, and cuts the sum off to 24 bits. That loses at most (t +
1) 2^-23 + 2^-23 <= 1.5 t 2^-23 of sum |X_i C_ki| <= |X| |C_k|, for each t products: g = G / (1 - G), G = 1.5 D 2^-23,
in whatever order and with whatever t. This is what was measured on sm_70, the coarsest: Fasi, Higham, Mikaitis and
Pranesh, "Numerical behavior of NVIDIA tensor cores" (PeerJ Computer Science 7:e330, 2021); for later ones see Khattak
and Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (arXiv 2512.07004, 2025): an instruction takes more products and
more bits. Products and subnormal operands are exact in all of them. A 16 x 16 x 16 product of WMMA, which the CUDA C++
kernel asks for, is four such steps with t = 4 on sm_70, in an order that the bound does not depend on: it is the worst
case above, and no worse.

Why the ids are exact. l_k = score_k - r a_k - z_k <= P^2 S_k <= h_k = l_k + 2 (r a_k + z_k). A kernel lowers `reach`,
the smallest h_k of those it looked at closely, and keeps centroids with low l_k. The nearest one k* has l_k* <= reach,
as l_k* <= P^2 S_k* <= P^2 S_k <= h_k for every k. If one centroid is left with l_k <= reach, and none of those was
dropped, all others are farther, and the row is decided. Else the few that are left are compared by sum((x - c)^2) in
float64 from the original values, ties to the lowest id. Rows for which a list was too short, or whose numbers left the
range of fp32 (r then is infinite), go to reference.py, which is exact by itself. A NaN or infinite feature makes r
infinite too (in the fast mode, the best score): such rows are found on the way, and are named in the error.

`centroids_of` and `rows_of` prepare the operands in plain torch, for GPUs without Triton; kernel.py does it in Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROW_ROUNDING = 2.0**-12
"""q of the bound: about the relative rounding error of a copied row."""

WIDER = 1 + 2.0**-9
"""Covers the rounding of a norm in fp32, and of what is made of it."""

ROUNDINGS = 2.0**-20
"""16 fp32 units of round-off."""

SUM_ROUNDINGS = 2.0**-36
"""Of a float64 sum of up to 2^16 terms."""

TINY, LARGE = 2.0**-100, 2.0**60
"""Limits within which products with a row's factor stay in the range of fp32."""

PIECE_BYTES = 64 * 2**20
"""Largest temporary buffer of the preparation in torch; a few of them exist at a time."""

FP32_SQUARES = 8192
"""Most squares that are added up in fp32: in any order the sum is off by less than WIDER covers."""


@dataclass(frozen=True)
class Centroids:
    """What a score kernel reads of the centroids; K padded to the tile and D to the product, G problems."""

    values: Tensor  # (G K, D) 16 bits
    bias: Tensor  # (G K) fp32: P^2 b_k - z_k, infinite for padding
    slope: Tensor  # (G K) fp32: a_k
    slack: Tensor  # (G K) fp32: z_k
    mean: Tensor  # (G, D not padded) fp32
    largest: Tensor  # (G,) fp32: the largest magnitude, which P is made of

    def of_groups(self, few: slice) -> Centroids:
        """Those of some of the problems; views."""
        values, bias, slope, slack = (
            part.unflatten(0, (len(self.largest), -1))[few].flatten(0, 1)
            for part in (self.values, self.bias, self.slope, self.slack)
        )
        return Centroids(values, bias, slope, slack, self.mean[few], self.largest[few])


@dataclass(frozen=True)
class Rows:
    """What a score kernel reads of the rows: (G n, D) 16 bits, and per row -2 P / W and r, where they are wanted."""

    values: Tensor
    scale: Tensor | None
    radius: Tensor | None


def is_centred(row_dtype: torch.dtype, direct: bool) -> bool:
    """Whether rows are centred: 16-bit ones are exact as they are, and would be rounded."""
    return not direct and row_dtype == torch.float32


def product_rounding(features: int) -> float:
    """g of the bound, for D = `features`, padded."""
    loss = 1.5 * features * 2.0**-23
    return loss / (1 - loss) if loss < 0.5 else float("inf")


def padded(size: int, block: int) -> int:
    """The smallest multiple of `block` that is not below `size`."""
    return -(-size // block) * block


def one_matrix(x: Tensor) -> Tensor:
    """x (G, n, D), whose groups follow each other, as (G n, D) without a copy."""
    return torch.as_strided(x, (x.shape[0] * x.shape[1], x.shape[2]), (x.stride(1), 1))


def mean_and_largest(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """m (G, D) and the largest magnitude (G,) of centroids (G, K, D), in fp32."""
    largest = torch.linalg.vector_norm(centroids, ord=torch.inf, dim=(1, 2)).float()
    return centroids.mean(1, dtype=torch.float32), largest


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two (fp32) that brings a magnitude to [2^13, 2^14), as far as it is a normal number; 1 for zero."""
    exponent = (largest.view(torch.int32) >> 23) & 0xFF
    field = torch.where(largest == 0, 127, (267 - exponent).clamp(1, 227)).to(torch.int32)
    return (field << 23).view(torch.float32)


def centroids_of(
    centroids: Tensor, row_dtype: torch.dtype, direct: bool, cluster_tile: int, feature_tile: int
) -> Centroids:
    """Float16 copy and error coefficients of centroids (G, K, D), for rows that are read where they lie or copied."""
    groups, clusters, features = centroids.shape
    shape = groups, padded(clusters, cluster_tile), padded(features, feature_tile)
    mean, largest = mean_and_largest(centroids)
    values = torch.zeros(shape, dtype=torch.float16, device=centroids.device)
    bias, slope, slack = torch.zeros(3, *shape[:2], dtype=torch.float32, device=centroids.device)
    bias[:, clusters:] = torch.inf
    # Padding has what a centroid at the mean would have, but for the bias.
    slack[:, clusters:] = TINY
    row_rounding = 0.0 if direct else ROW_ROUNDING
    relative = row_rounding + product_rounding(shape[2]) + ROUNDINGS
    step = max(1, PIECE_BYTES // (8 * features))
    for group in range(groups):
        scale = power_of_two(largest[group]).double()
        centre = mean[group].double() * scale
        for start in range(0, clusters, step):
            few = slice(start, min(start + step, clusters))
            moved = (centroids[group, few].double() * scale).sub_(centre)
            values[group, few, :features] = moved.float().half()
            squares = _sum_of_squares(moved)
            cross = moved * centre
            terms = squares + 2 * cross.abs().sum(1)
            if not is_centred(row_dtype, direct):
                squares += 2 * cross.sum(1)
            rounded = values[group, few, :features].double()
            lost = _sum_of_squares(moved.sub_(rounded)).sqrt()
            norm = _sum_of_squares(rounded).sqrt() + lost
            allowance = ROUNDINGS * squares.abs() + SUM_ROUNDINGS * terms + TINY
            slope[group, few] = (WIDER * (lost + relative * norm)).float()
            slack[group, few] = allowance.float()
            bias[group, few] = (squares - allowance).float()
    return Centroids(values.flatten(0, 1), bias.flatten(), slope.flatten(), slack.flatten(), mean, largest)


def rows_of(x: Tensor, prepared: Centroids, direct: bool) -> Rows:
    """x (G, n, D) as a score kernel reads it, with the factor and the radius of each row."""
    groups, n, features = x.shape
    padded_features = prepared.values.shape[1]
    copy = None if direct else x.new_zeros(groups, n, padded_features, dtype=torch.float16)
    scale, radius = torch.empty(2, groups, n, dtype=torch.float32, device=x.device)
    step = max(1, PIECE_BYTES // (4 * features))
    for group in range(groups):
        factor = -2 * power_of_two(prepared.largest[group])
        centre = prepared.mean[group] if is_centred(x.dtype, direct) else None
        for start in range(0, n, step):
            few = slice(start, min(start + step, n))
            if copy is None:
                own, norm = torch.ones_like(scale[group, few]), WIDER * _norm(x[group, few])
            else:
                own, norm = _copy_rows(x[group, few], centre, out=copy[group, few, :features])
            scale[group, few] = factor / own
            radius[group, few] = _radius(norm, factor / own)
    values = one_matrix(x) if copy is None else copy.flatten(0, 1)
    return Rows(values, scale.flatten(), radius.flatten())


def _copy_rows(x: Tensor, centre: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write W (x - centre) of rows (n, D) into out, in float16; returns W and max(|X|, |R| / q), (n,) each."""
    shifted = x.float() if centre is None else x.float() - centre
    own = power_of_two(torch.linalg.vector_norm(shifted, ord=torch.inf, dim=1))
    shifted = shifted * own[:, None]
    out.copy_(shifted)
    norm = WIDER * _norm(out)
    # The last two terms cover the rounding of x - centre in fp32, and underflow.
    lost = WIDER * _norm(shifted.sub_(out)) + 2.0**-22 * norm + 2.0**-60
    return own, torch.maximum(norm, lost / ROW_ROUNDING)


def _radius(norm: Tensor, scale: Tensor) -> Tensor:
    """r (n,): infinite, which decides nothing, where products with the factor may leave the range of fp32."""
    reach = WIDER * norm * -scale
    # NaN compares false, so that rows which are not finite end here too.
    return torch.where((reach < LARGE) & (-scale > TINY), reach, torch.inf)


def _norm(rows: Tensor) -> Tensor:
    """Norms (n,) of rows (n, D), fp32."""
    dtype = torch.float32 if rows.shape[1] <= FP32_SQUARES else torch.float64
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).float()


def _sum_of_squares(rows: Tensor) -> Tensor:
    return (rows * rows).sum(1)
