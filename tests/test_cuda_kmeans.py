"""kmeans_assign in CUDA C++ without a GPU, beyond test_ops.py and test_kmeans.py: its lists, its bound, its limits.

The kernel's own source runs thread by thread on the CPU (emulation.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import cuda_tools
import pytest
import torch
from emulation import AssignCentroids, AssignHost, AssignLists, AssignRows, AssignSizes, emulated_assign, library
from kmeans_checks import (
    FOR_KERNELS,
    all_distances,
    assert_float64_argmin,
    attack,
    cut_off_attack,
    near_ties,
    randn,
    relu,
)
from op_checks import assert_same_bits
from torch import Tensor

from mapet_kernels import kmeans, kmeans_assign
from mapet_kernels.kmeans_assign import bound, candidates
from mapet_kernels.kmeans_assign.bound import Centroids, Rows
from mapet_kernels.kmeans_assign.candidates import Lists
from mapet_kernels.kmeans_assign.passes import DECIDED, OPEN, UNDECIDED

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TILE, WARP, HALF = 128, 64, 8
"""Centroids of a block's tile, of a warp's part of it, and of the half row of a 16 x 16 product that one lane sees."""
each_mode = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])


@pytest.fixture
def use() -> Iterator[Callable[..., AssignHost]]:
    """use(architecture, descending, coarse) makes the op take the emulated kernel so; new memory is NaN."""
    with emulated_assign() as emulated:

        def use(*options, **more) -> AssignHost:
            emulated.host = AssignHost(*options, **more)
            return emulated.host

        yield use


@pytest.mark.parametrize("name", FOR_KERNELS)
def test_exact_ids_are_the_float64_argmin_with_the_coarsest_sums(use, name: str) -> None:
    use(coarse=True)
    x, centroids = attack(name, for_kernels=True)
    assert_float64_argmin(kmeans_assign(x, centroids), x, centroids)


def test_the_lowest_id_wins_where_float64_decides_too(use) -> None:
    """More equal centroids than the lists hold, and as many as they hold: both ways to decide again."""
    x = torch.ones(5, 32)
    centroids = torch.cat([randn(40, 32) + 3, torch.ones(300, 32)])
    ids, again = kmeans_assign(x, centroids, return_redecided=True)
    assert again.tolist() == [0, 5] and torch.equal(ids, torch.full((5,), 40))
    ids, again = kmeans_assign(x, centroids[[*range(40), 40, 41]], return_redecided=True)
    assert again.tolist() == [5, 0] and torch.equal(ids, torch.full((5,), 40))


def whole_numbers(groups: int, n: int, clusters: int, features: int) -> tuple[Rows, Centroids]:
    """Operands for which fp32 makes no rounding, whatever the order; many bounds are equal."""
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    rows = Rows(
        integers(-2, 2, groups * n, features).half(),
        -(2.0 ** integers(-1, 1, groups * n)),
        integers(0, 4, groups * n),
    )
    count = groups * clusters
    bias, slope, slack = integers(-9, 9, count), integers(0, 4, count) / 4, integers(0, 8, count) / 8
    mean, largest = torch.zeros(groups, features), torch.ones(groups)
    return rows, Centroids(integers(-2, 2, count, features).half(), bias, slope, slack, mean, largest)


def scored(host: AssignHost, rows: Rows, centroids: Centroids, groups: int, shares: int, exact: bool) -> Lists:
    n = len(rows.values) // groups
    lists = candidates.empty_lists(shares, groups * n, exact, torch.device("cpu"))
    host.scores(rows, centroids, groups, n, shares, lists)
    return lists


def parts(lists: Lists) -> list[Tensor]:
    return [x for x in (lists.bounds, lists.ids, lists.reach) if x is not None]


@each_mode
@pytest.mark.parametrize("shares", [1, 2, 3, 5])
def test_lists_hold_the_lowest_of_their_centroids(use, shares: int, exact: bool) -> None:
    """Every list against float64: which centroids are its own, the lowest bounds in order, ties by id; its reach."""
    groups, n, clusters = 2, 150, 384
    rows, centroids = whole_numbers(groups, n, clusters, 64)
    lists = scored(use(), rows, centroids, groups, shares, exact)
    column = torch.arange(clusters)
    share_tiles = -(-clusters // TILE // shares)
    owner = column // TILE // share_tiles * candidates.LISTS + column % TILE // WARP * 2 + column % (2 * HALF) // HALF
    for group in range(groups):
        mine, own = slice(group * n, (group + 1) * n), slice(group * clusters, (group + 1) * clusters)
        product = rows.values[mine].double() @ centroids.values[own].double().T
        width = rows.radius[mine, None].double() * centroids.slope[own]
        lower = product * rows.scale[mine, None] + centroids.bias[own] - (width if exact else 0.0)
        upper = lower + 2 * (width + centroids.slack[own])
        for i_list in range(shares * candidates.LISTS):
            ids = column[owner == i_list]
            slots = lists.bounds.shape[1]
            order = torch.argsort(lower[:, ids], stable=True)[:, :slots]  # equal ones stay in the order of their ids
            bounds, kept = lists.bounds[i_list, :, mine].T.double(), lists.ids[i_list, :, mine].T.long()
            if len(ids) == 0:
                assert bounds.isposinf().all() and (kept == -1).all(), "the share has no centroid"
                continue
            assert torch.equal(kept, ids[order])
            assert torch.equal(bounds, lower.gather(1, kept))
            if exact:
                reach = lists.reach[i_list, mine].double()
                assert (reach[:, None] == upper[:, ids]).any(1).all()
                assert (reach <= upper.gather(1, kept).amin(1)).all()


@each_mode
def test_the_same_bits_whatever_the_order_of_threads(use, exact: bool) -> None:
    """Threads and blocks ascending and descending, copies held in registers or ahead of the products."""
    x, centroids = relu(2, 150, 96).half(), relu(2, 300, 96, seed=1)
    prepared = candidates.prepare(centroids, x.dtype, True, candidates.CONFIG)
    rows = bound.rows_of(x, prepared, True)
    first = scored(use(70, False), rows, prepared, 2, 2, exact)
    for architecture, descending in ((70, True), (80, False), (80, True)):
        again = scored(use(architecture, descending), rows, prepared, 2, 2, exact)
        assert_same_bits(parts(again), parts(first))


@pytest.mark.parametrize("architecture", [70, 80])
@each_mode
def test_poison_beyond_the_data_changes_nothing(use, exact: bool, architecture: int) -> None:
    """NaN in the centroids that pad K, in memory between rows and behind the last, and in rows that are not finite."""
    host = use(architecture)
    x, centroids = relu(150, 64).half(), relu(140, 64, seed=1)
    prepared = candidates.prepare(centroids[None], x.dtype, True, candidates.CONFIG)
    rows = bound.rows_of(x[None], prepared, True)
    expected = scored(host, rows, prepared, 1, 1, exact)
    padding = slice(140, None)
    prepared.values[padding], prepared.slope[padding], prepared.slack[padding] = torch.nan, torch.nan, torch.nan
    apart = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, :64]
    poisoned = Rows(apart, rows.scale, rows.radius)
    assert_same_bits(parts(scored(host, poisoned, prepared, 1, 1, exact)), parts(expected))
    bad = torch.arange(150) % 7 == 3
    radius = torch.where(bad, torch.inf, rows.radius)
    values = torch.where(bad[:, None], torch.nan, x)
    lists = scored(host, Rows(values, rows.scale, radius), prepared, 1, 1, exact)
    assert torch.equal(lists.bounds[..., ~bad], expected.bounds[..., ~bad])
    assert torch.equal(lists.ids[..., ~bad], expected.ids[..., ~bad])
    assert (candidates.merge(lists)[1][bad] == OPEN).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_exact_on_the_worst_tensor_cores(use, dtype: torch.dtype) -> None:
    """Decided among a few candidates, and among all where lists were too short; the fast mode is wrong on both."""
    use(coarse=True)
    x, centroids = cut_off_attack(dtype)
    again = kmeans_assign(x, centroids, return_redecided=True)[1]
    assert again.tolist() == [0, 40]
    three = centroids[[0, 20, 40]]
    ids, again = kmeans_assign(x, three, return_redecided=True)
    assert_float64_argmin(ids, x, three)
    assert again.tolist() == [40, 0]
    assert (kmeans_assign(x, three, exact=False) != all_distances(x, three).argmin(1)).sum() > 10


@pytest.mark.parametrize(
    ("dtype", "spread"),
    [*((dtype, spread) for dtype in DTYPES for spread in (1e-3, 1.0, 100.0)), (torch.float16, None)],
)
def test_bounds_hold_on_the_worst_tensor_cores(use, dtype: torch.dtype, spread: float | None) -> None:
    """l_k <= P^2 S_k <= h_k of bound.py, with as many centroids as the lists hold, so that all bounds can be read."""
    if spread is None:  # no operand is rounded, so that the sum of products, long and of one sign, is all that is off
        half = (1 + 0.3 * relu(6, 1024, seed=1)).half().float()
        x, centroids = (1 + 0.3 * relu(40, 1024)).to(dtype), torch.cat([half, -half])
    else:
        x, centroids = (relu(40, 256) * spread + 1).to(dtype), relu(12, 256, seed=1) * spread + 1
    direct = candidates.is_direct(x[None], True, candidates.CONFIG)
    prepared = candidates.prepare(centroids[None], dtype, direct, candidates.CONFIG)
    columns = torch.tensor([first + i for first in (0, HALF, WARP, WARP + HALF) for i in range(3)])
    source = torch.full((TILE,), TILE - 1)  # padding
    source[columns] = torch.arange(12)
    spread_out = [getattr(prepared, name)[source] for name in ("values", "bias", "slope", "slack")]
    rows = bound.rows_of(x[None], prepared, direct)
    moved_apart = Centroids(*spread_out, prepared.mean, prepared.largest)
    lists = scored(use(coarse=True), rows, moved_apart, 1, 1, exact=True)
    ids = lists.ids.flatten(0, 1).T.long()  # (n, 12)
    assert torch.equal(ids.sort(1).values, columns.expand(40, -1))
    lower = lists.bounds.flatten(0, 1).T.double()
    width = (rows.radius[:, None] * moved_apart.slope[ids] + moved_apart.slack[ids]).double()
    truth = scaled_scores(x, centroids, prepared, bound.is_centred(dtype, direct)).gather(1, source[ids])
    assert torch.all(lower <= truth) and torch.all(truth <= lower + 2 * width)
    assert (lower + width - truth).abs().max() > 0.002 * width.max(), "the bound is far wider than what it covers"


def scaled_scores(x: Tensor, centroids: Tensor, prepared: Centroids, is_centred: bool) -> Tensor:
    """P^2 S_k of bound.py, (n, K) float64."""
    scale = bound.power_of_two(prepared.largest).double()
    mean = prepared.mean[0].double()
    moved = centroids.double() - mean
    own, constant = (x.double() - mean, 0 * mean) if is_centred else (x.double(), mean)
    return (moved.square().sum(1) + 2 * moved @ constant - 2 * own @ moved.T) * scale**2


@pytest.mark.parametrize("gap", [1e-5, 1e-7])
def test_products_in_half_precision_mislead_and_the_exact_mode_is_not_misled(use, gap: float) -> None:
    x, centroids = (values.float() for values in near_ties(200, 64, gap))
    truth = all_distances(x, centroids).argmin(1)
    assert (kmeans_assign(x, centroids, exact=False) != truth).sum() > 10
    ids, again = kmeans_assign(x, centroids, return_redecided=True)
    assert torch.equal(ids, truth) and again[0] > 100


def lists_of(bounds: list[list[float]], reach: list[float], ids: list[list[int]] | None = None) -> Lists:
    """The lists of one row."""
    ids = ids or [[10 * i + j for j in range(len(row))] for i, row in enumerate(bounds)]
    return Lists(torch.tensor(bounds)[..., None], torch.tensor(ids).int()[..., None], torch.tensor(reach)[:, None])


@pytest.mark.parametrize(
    ("lists", "id", "status"),
    [
        (lists_of([[1.0, 5, 6], [4, 8, 9]], [3.0, 7]), 0, DECIDED),
        (lists_of([[3.0, 5, 6], [2, 8, 9]], [4.0, 3]), 0, UNDECIDED),
        (lists_of([[3.0, 5, 6], [2, 8, 9]], [4.0, 2.5]), 10, DECIDED),
        (lists_of([[1.0, 2, 3], [4, 8, 9]], [3.0, 7]), 0, OPEN),
        (lists_of([[1.0, 2, torch.inf], [torch.inf] * 3], [3.0, torch.inf]), 0, UNDECIDED),
        (lists_of([[2.0, 9, 9], [2, 9, 9]], [2.0, 2], [[8, 0, 1], [3, 4, 5]]), 3, UNDECIDED),
        (lists_of([[-torch.inf] * 3] * 2, [torch.inf] * 2, [[-1] * 3] * 2), -1, OPEN),
        (lists_of([[1.0, 5, 6], [4, 8, 9]], [torch.inf, torch.inf]), 0, OPEN),
    ],
    ids=["one", "several", "reach of another list", "full list", "no more", "tie", "not finite", "out of range"],
)
def test_merging_lists(lists: Lists, id: int, status: int) -> None:
    nearest, found = candidates.merge(lists)
    assert found.item() == status and nearest.item() == id


def test_sizes_are_those_of_the_header() -> None:
    """And shared memory is what a kernel has without asking for more."""
    values = (ctypes.c_int * 6)()
    library("kmeans").host_assign_constants(values)
    config = candidates.CONFIG
    assert list(values) == [config.rows, config.clusters, config.features, candidates.LISTS, config.capacity, 1]
    assert library("kmeans").host_assign_shared_bytes() == 48 << 10 <= min(cuda_tools.SHARED_LIMITS.values())


def test_what_the_launcher_refuses() -> None:
    memory = torch.zeros(64)
    at = memory.data_ptr() + -memory.data_ptr() % 16

    def refusal(sizes: AssignSizes, offset: int = 0, stride: int = 32, architecture: int = 70) -> str:
        rows, centroids = AssignRows(at + offset, stride, at, at), AssignCentroids(at, at, at, at)
        parts = map(ctypes.byref, (sizes, rows, centroids))
        problem = library("kmeans").host_assign_scores(*parts, 1, ctypes.byref(AssignLists()), architecture, 0, 0)
        return "ok" if problem is None else problem.decode()

    assert refusal(AssignSizes(1, 0, 128, 32, 1)) == "ok"
    for sizes in (AssignSizes(1, 0, 100, 32, 1), AssignSizes(1, 0, 128, 40, 1), AssignSizes(1, 0, 128, 32, 0)):
        assert refusal(sizes).startswith("centroids must be padded to multiples of 128, features to multiples of 32")
    fits = AssignSizes(1, 0, 128, 32, 1)
    aligned = "operands must start at multiples of 16 bytes, and rows too"
    assert refusal(fits, offset=2) == refusal(fits, stride=36) == aligned
    assert refusal(fits, architecture=61) == "tensor cores need a GPU of sm_70 or newer"


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"takes float16, bfloat16 and float32, got float64; use backend='reference'"):
        AssignHost().kmeans_assign(randn(4, 3).double(), randn(2, 3), True, False)


def test_fit_with_the_cuda_assignment(use) -> None:
    """The sums of clusters have no kernel in CUDA C++: they are plain torch where Triton cannot run."""
    x = randn(400, 20) + 4 * randn(8, 20, seed=1)[torch.arange(400) % 8]
    fitted, expected = (kmeans.fit(x, 8, iterations=5, redos=2, backend=name) for name in ("cuda", "reference"))
    assert torch.equal(fitted.centroids, expected.centroids) and torch.equal(fitted.counts, expected.counts)
    assert fitted.objective == pytest.approx(expected.objective, rel=1e-6)
