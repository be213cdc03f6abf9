"""The CUDA C++ kernel of kmeans_assign without a GPU: its own source run on the CPU, and compiled for GPUs.

test_cuda_source.py does the same for attention. The attacks are those of the Triton kernels (kmeans_attacks.py).
"""

from __future__ import annotations

import ctypes
import random
import shutil
from pathlib import Path

import cuda_tools
import pytest
import torch
from cuda_host import COMPILER
from kmeans_attacks import ATTACKS, cut_off_attack, relu
from kmeans_host import AssignCentroids, AssignLists, AssignRows, AssignSizes, HostBackend, compile_library
from test_cuda_embed import pretend_v100
from test_kmeans import all_distances, assert_float64_argmin, near_ties, randn
from torch import Tensor

from bench.kernels_suite import OpCall, reason_against
from mapet_kernels import backends, kmeans, kmeans_assign, launch
from mapet_kernels.kmeans_assign import bound, candidates, op, passes
from mapet_kernels.kmeans_assign.bound import Centroids, Rows
from mapet_kernels.kmeans_assign.candidates import Lists
from mapet_kernels.kmeans_assign.passes import DECIDED, OPEN, UNDECIDED
from mapet_kernels.registry import REGISTRY

SPEC = REGISTRY["kmeans_assign"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MOST_REGISTERS, WITHOUT_ASKING = 200, 48 << 10
KERNELS = [
    f"mapet::scores_kernel<__half, {exact}, {ahead}>" for exact in ("true", "false") for ahead in ("true", "false")
]
TILE, WARP, HALF = 128, 64, 8
"""Centroids of a block's tile, of a warp's part of it, and of the half row of a 16 x 16 product that one lane sees."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    library = compile_library(tmp_path_factory.mktemp("kmeans_host"))
    if not hasattr(library, "host_assign_scores"):
        pytest.skip("the C++ compiler has no _Float16")
    return library


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL):
    """use(architecture, descending, coarse) makes the op take the emulated kernel, as at first; new memory is NaN."""

    def use(architecture: int = 70, descending: bool = False, coarse: bool = False) -> HostBackend:
        host = HostBackend(library, architecture, descending, coarse)
        monkeypatch.setattr(op, "_backend", lambda name: host)
        return host

    monkeypatch.setattr(op, "choose_listed_backend", lambda *_, **__: "cuda")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    use()
    torch.use_deterministic_algorithms(True)
    yield use
    torch.use_deterministic_algorithms(False)


def redecided(x: Tensor, centroids: Tensor) -> tuple[int, int]:
    """Rows decided again among a few centroids, and among all; the ids are checked on the way."""
    ids, counts = kmeans_assign(x, centroids, return_redecided=True)
    assert_float64_argmin(ids, x, centroids)
    return tuple(counts.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPEC.shapes)
def test_registry_shapes(use, name: str, dtype: torch.dtype) -> None:
    """One row, one cluster, one feature, sizes that fill no tile, groups: the float64 argmin and its distance."""
    case = SPEC.make_case(SPEC.shapes[name], dtype)
    ids, distances = SPEC.plain(**{key: x.double() for key, x in case.inputs.items()}, **case.options)
    actual = SPEC.function(**case.inputs, **case.options)
    assert torch.equal(actual[0], ids)
    torch.testing.assert_close(actual[1].double(), distances, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("coarse", [False, True], ids=["host sums", "coarse sums"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_exact_ids_are_the_float64_argmin(use, attack: str, coarse: bool) -> None:
    """Exact ties, near ties, offsets, huge and subnormal values; sums as a loop makes them, and as coarse as may be."""
    use(coarse=coarse)
    x, centroids = ATTACKS[attack]()
    assert_float64_argmin(kmeans_assign(x, centroids), x, centroids)


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(monkeypatch: pytest.MonkeyPatch, use, seed: int) -> None:
    """Any n, K, D, groups, shares, dtypes, scales and offsets; few levels make ties and duplicates common."""
    choose = random.Random(seed)
    use(choose.choice((70, 80)), choose.random() < 0.5)
    count = choose.choice((1, 1, 3, 8))
    monkeypatch.setattr(passes, "processors", lambda _: count)
    n, k, d = choose.randint(1, 200), choose.choice((1, 2, 17, 129, 300)), choose.choice((1, 3, 8, 31, 32, 33, 97))
    lead = choose.choice(((), (), (1,), (3,)))
    dtype = choose.choice(DTYPES)
    generator = torch.Generator().manual_seed(seed)
    levels = choose.choice((2, 5, 1000))
    values = torch.randint(levels, (*lead, n + k, d), generator=generator) / levels + choose.choice((0.0, 1.0, 100.0))
    values = (values * 10.0 ** (choose.randint(-3, 2) if dtype == torch.float16 else choose.randint(-30, 30))).to(dtype)
    x, centroids = values[..., :n, :], values[..., n:, :].contiguous()
    ids, distances = kmeans_assign(x, centroids, return_distance=True)
    assert ids.shape == distances.shape == (*lead, n)
    for group in range(*lead or (1,)):
        here = group if lead else ...
        assert_float64_argmin(ids[here], x[here], centroids[here])
        truth = (x[here].double() - centroids[here].double()[ids[here]]).square().sum(-1)
        torch.testing.assert_close(distances[here], truth.float(), rtol=2.0**-22, atol=d * 2.0**-149)


@pytest.mark.parametrize("exact", [True, False])
def test_ties_go_to_the_lowest_id(use, exact: bool) -> None:
    """Within a lane's eight scores, between lanes, warps, tiles and shares of the centroids."""
    centroids = randn(30, 32)
    repeated = torch.cat([centroids] * 12).half()
    assert torch.equal(kmeans_assign(centroids.half(), repeated, exact=exact), torch.arange(30))
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert torch.equal(kmeans_assign(torch.zeros(7, 2), corners, exact=exact), torch.zeros(7, dtype=torch.int64))
    for first, second in ((3, 5), (3, 12), (40, 70), (100, 200)):
        two = torch.full((260, 8), 5.0)
        two[[first, second]] = 1.0
        assert kmeans_assign(torch.ones(1, 8), two, exact=exact).item() == first


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


def scored(host: HostBackend, rows: Rows, centroids: Centroids, groups: int, shares: int, exact: bool) -> Lists:
    n = len(rows.values) // groups
    lists = candidates.empty_lists(shares, groups * n, exact, torch.device("cpu"))
    host.scores(rows, centroids, groups, n, shares, lists)
    return lists


def same_bits(a: Lists, b: Lists) -> bool:
    reaches = [lists.reach if lists.reach is not None else torch.zeros(1) for lists in (a, b)]
    return torch.equal(a.bounds, b.bounds) and torch.equal(a.ids, b.ids) and torch.equal(*reaches)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
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


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_the_same_bits_whatever_the_order_of_threads(use, exact: bool) -> None:
    """Threads and blocks ascending and descending, copies held in registers or ahead of the products."""
    x, centroids = relu(2, 150, 96).half(), relu(2, 300, 96, seed=1)
    prepared = candidates.prepare(centroids, x.dtype, True, candidates.CONFIG)
    rows = bound.rows_of(x, prepared, True)
    first = scored(use(70, False), rows, prepared, 2, 2, exact)
    for architecture, descending in ((70, True), (80, False), (80, True)):
        assert same_bits(first, scored(use(architecture, descending), rows, prepared, 2, 2, exact))


@pytest.mark.parametrize("architecture", [70, 80])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
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
    assert same_bits(scored(host, poisoned, prepared, 1, 1, exact), expected)
    bad = torch.arange(150) % 7 == 3
    radius = torch.where(bad, torch.inf, rows.radius)
    values = torch.where(bad[:, None], torch.nan, x)
    lists = scored(host, Rows(values, rows.scale, radius), prepared, 1, 1, exact)
    assert torch.equal(lists.bounds[..., ~bad], expected.bounds[..., ~bad])
    assert torch.equal(lists.ids[..., ~bad], expected.ids[..., ~bad])
    assert (candidates.merge(lists)[1][bad] == OPEN).all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("dtype", "bad"), [(torch.float16, torch.nan), (torch.bfloat16, torch.inf)], ids=str)
def test_rows_that_are_not_finite_are_named(use, exact: bool, dtype: torch.dtype, bad: float) -> None:
    x, centroids = randn(40, 32).to(dtype), randn(9, 32, seed=1)
    x[7, 3] = x[31, 0] = bad
    with pytest.raises(ValueError, match=r"x must be finite, but 2 of its rows .* first are 7, 31;"):
        kmeans_assign(x, centroids, exact=exact)
    with pytest.raises(ValueError, match=r"x must be finite, but 2 of its rows .* \(1, 7\), \(1, 31\);"):
        kmeans_assign(torch.stack([randn(40, 32).to(dtype), x]), torch.stack([centroids, centroids]), exact=exact)
    centroids[5, 31] = bad
    with pytest.raises(ValueError, match=r"centroids must be finite, but 1 of its rows .* first are 5;"):
        kmeans_assign(x, centroids, exact=exact)


def test_no_row_at_all(use) -> None:
    ids, distances = kmeans_assign(torch.zeros(0, 8), randn(3, 8), return_distance=True)
    assert ids.shape == distances.shape == (0,)


def test_rows_anywhere_in_memory_give_the_same_ids(use) -> None:
    x, centroids = relu(50, 64).half(), relu(40, 64, seed=1).half()
    expected = kmeans_assign(x, centroids)
    unaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    apart = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, :64]
    turned = x.T.contiguous().T
    kinds = [candidates.is_direct(v[None], True, candidates.CONFIG) for v in (x, apart, unaligned, turned)]
    assert kinds == [True, True, False, False]
    assert not candidates.is_direct(x[None].bfloat16(), False, candidates.CONFIG), "V100 cannot multiply bfloat16"
    for other in (apart, unaligned, turned):
        assert torch.equal(kmeans_assign(other, centroids.T.contiguous().T), expected)
    grouped = torch.stack([x, x.flip(0)])
    both = kmeans_assign(grouped, torch.stack([centroids, centroids]))
    assert torch.equal(both, torch.stack([expected, expected.flip(0)]))


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
def test_shares_of_the_centroids_do_not_change_the_ids(monkeypatch: pytest.MonkeyPatch, use, shares: int) -> None:
    monkeypatch.setattr(launch, "kmeans_assign_shares", lambda *_: shares)
    x, centroids = relu(50, 32).half(), relu(400, 32, seed=1)
    centroids[300:] = centroids[:100]
    truth = all_distances(x, centroids).argmin(1)
    assert torch.equal(kmeans_assign(x, centroids), truth)
    assert torch.equal(kmeans_assign(x, centroids, exact=False), truth)


def test_chunks_of_rows_do_not_change_the_ids(monkeypatch: pytest.MonkeyPatch, use) -> None:
    x, centroids = (values.float() for values in near_ties(300, 16, 1e-7))
    whole = kmeans_assign(x, centroids, return_distance=True, return_redecided=True)
    monkeypatch.setattr(passes, "CHUNK_ROWS", 1)
    pieces = kmeans_assign(x, centroids, return_distance=True, return_redecided=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_exact_on_the_worst_tensor_cores(use, dtype: torch.dtype) -> None:
    """Decided among a few candidates, and among all where lists were too short; the fast mode is wrong on both."""
    use(coarse=True)
    x, centroids = cut_off_attack(dtype)
    assert redecided(x, centroids) == (0, 40)
    three = centroids[[0, 20, 40]]
    assert redecided(x, three) == (40, 0)
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


def test_most_rows_of_clip_like_features_need_no_second_look(use) -> None:
    """Rows around centroids, non-negative: the bound for 4096 features leaves none of them; of pure noise a few."""
    centroids = relu(60, 4096, seed=1)
    x = (centroids[:32] + 0.5 * randn(32, 4096)).relu().half()
    assert redecided(x, centroids) == (0, 0)
    assert sum(redecided(relu(32, 4096).half(), centroids)) < 16


def test_fast_mode_agrees_on_separated_data(use) -> None:
    for dtype in DTYPES:
        x, centroids = randn(36, 64).to(dtype), (3 * randn(50, 64, seed=1)).to(dtype)
        ids, distances = kmeans_assign(x, centroids, exact=False, return_distance=True)
        truth = all_distances(x, centroids)
        assert torch.equal(ids, truth.argmin(1))
        expected = (x.double() - centroids.double()[ids]).square().sum(1)
        torch.testing.assert_close(distances.double(), expected, rtol=2.0**-22, atol=0)


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


def test_sizes_are_those_of_the_header(library: ctypes.CDLL) -> None:
    values = (ctypes.c_int * 6)()
    library.host_assign_constants(values)
    config = candidates.CONFIG
    expected = [config.rows, config.clusters, config.features, candidates.LISTS, config.capacity, 1]
    assert list(values) == expected


def test_shared_memory_is_within_every_limit(library: ctypes.CDLL) -> None:
    """What a kernel has without asking for more."""
    assert library.host_assign_shared_bytes() == WITHOUT_ASKING <= min(cuda_tools.SHARED_LIMITS.values())


def test_what_the_launcher_refuses(library: ctypes.CDLL) -> None:
    memory = torch.zeros(64)
    at = memory.data_ptr() + -memory.data_ptr() % 16

    def refusal(sizes: AssignSizes, offset: int = 0, stride: int = 32, architecture: int = 70) -> str:
        rows, centroids = AssignRows(at + offset, stride, at, at), AssignCentroids(at, at, at, at)
        parts = map(ctypes.byref, (sizes, rows, centroids))
        problem = library.host_assign_scores(*parts, 1, ctypes.byref(AssignLists()), architecture, 0, 0)
        return "ok" if problem is None else problem.decode()

    assert refusal(AssignSizes(1, 0, 128, 32, 1)) == "ok"
    for sizes in (AssignSizes(1, 0, 100, 32, 1), AssignSizes(1, 0, 128, 40, 1), AssignSizes(1, 0, 128, 32, 0)):
        assert refusal(sizes).startswith("centroids must be padded to multiples of 128, features to multiples of 32")
    fits = AssignSizes(1, 0, 128, 32, 1)
    aligned = "operands must start at multiples of 16 bytes, and rows too"
    assert refusal(fits, offset=2) == refusal(fits, stride=36) == aligned
    assert refusal(fits, architecture=61) == "tensor cores need a GPU of sm_70 or newer"


def test_float64_is_refused_by_name(library: ctypes.CDLL) -> None:
    with pytest.raises(TypeError, match=r"takes float16, bfloat16 and float32, got float64; use backend='reference'"):
        HostBackend(library).kmeans_assign(randn(4, 3).double(), randn(2, 3), True, False)


def test_auto_assigns_with_the_cuda_kernel_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every dtype but float64, since operands are float16 whatever the input; the benchmarks do not refuse it."""

    def auto(dtype: torch.dtype) -> str:
        return backends.choose_listed_backend("auto", op.BACKENDS, "cuda", dtype)

    monkeypatch.setattr(backends, "reason_against_triton", lambda *_: "needs compute capability 8.0")
    assert auto(torch.float16) == "reference", "the kernels are not built"
    pretend_v100(monkeypatch)
    assert {auto(dtype) for dtype in DTYPES} == {"cuda"} and auto(torch.float64) == "reference"
    with pytest.raises(ValueError, match="'cuda' cannot run here: takes float16, bfloat16 and float32, not float64"):
        backends.choose_listed_backend("cuda", op.BACKENDS, "cuda", torch.float64)
    call = OpCall(SPEC, SPEC.make_case(SPEC.shapes["one_row"], torch.float32), "cuda")
    assert reason_against(call, torch.device("cuda"), torch.float32) is None


def test_fit_with_the_cuda_assignment(request: pytest.FixtureRequest) -> None:
    """The sums of clusters have no kernel in CUDA C++: they are plain torch where Triton cannot run."""
    x = randn(400, 20) + 4 * randn(8, 20, seed=1)[torch.arange(400) % 8]
    expected = kmeans.fit(x, 8, iterations=5, redos=2, backend="reference")
    request.getfixturevalue("use")
    fitted = kmeans.fit(x, 8, iterations=5, redos=2, backend="cuda")
    assert torch.equal(fitted.centroids, expected.centroids) and torch.equal(fitted.counts, expected.counts)
    assert fitted.objective == pytest.approx(expected.objective, rel=1e-6)


def check_resources(resources: list[cuda_tools.Resources]) -> None:
    assert len(resources) == len(KERNELS)
    for one in resources:
        assert one.spilled == 0 and one.registers <= MOST_REGISTERS, one


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", [75, 90])
def test_nvcc_compiles_without_spills(architecture: int, tmp_path: Path) -> None:
    """All kernels that the library holds; products are the tensor cores', copies run ahead from sm_80 on."""
    cubin = tmp_path / "kmeans_assign.cubin"
    check_resources(cuda_tools.nvcc_cubin(cuda_tools.CSRC / "kmeans_assign.cu", architecture, cubin))
    if cuda_tools.cuobjdump() is None:
        pytest.skip("compiled without spills; cuobjdump is not there to count tensor-core instructions")
    found = cuda_tools.instructions(cubin)
    product = "HMMA.16816" if architecture >= 80 else "HMMA.1688"
    assert len(found) == len(KERNELS) and all(counts[product] for counts in found.values()), found
    ahead = [name for name, counts in found.items() if counts["LDGSTS"]]
    assert len(ahead) == (2 if architecture >= 80 else 0) and all("ELb1EEEv" in name for name in ahead)


def test_nvrtc_12_compiles_for_volta_without_spills() -> None:
    """V100, sm_70: CUDA 13 cannot compile for it any more."""
    compiler = cuda_tools.Nvrtc12.find()
    if isinstance(compiler, str):
        pytest.skip(f"needs the CUDA 12 compiler: {compiler}")
    log, ptx = compiler.compile(KERNELS, "sm_70", header="kmeans_assign.cuh")
    check_resources(cuda_tools.parse_resources(log))
    assert all("sm_70" in entry for entry in log.split("Compiling entry function")[1:])
    assert all("wmma.mma.sync.aligned" in body for body in ptx.split(".entry ")[1:])
