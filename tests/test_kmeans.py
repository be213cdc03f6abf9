"""kmeans_assign and kmeans_update: the float64 argmin under attack, exact sums.

Each way to assign (kmeans_checks.py) takes the same tests: reference and emulated CUDA kernels here, Triton's kernels
in a process with TRITON_INTERPRET=1, which test_triton_interpreter.py starts, and what a GPU runs.
"""

import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kmeans_checks import (
    ATTACKS,
    DEVICES,
    DTYPES,
    FOR_KERNELS,
    Assign,
    all_distances,
    assert_float64_argmin,
    assign,
    attack,
    kernels,
    near_ties,
    randn,
    relu,
)
from op_checks import assert_same_bits, default_device
from torch import Tensor

from mapet_kernels import kmeans_assign, kmeans_update, launch
from mapet_kernels.backends import INTERPRETED
from mapet_kernels.kmeans_assign import passes
from mapet_kernels.kmeans_assign import reference as assign_reference
from mapet_kernels.kmeans_update import reference as update_reference
from mapet_kernels.launch import AssignConfig

__all__ = ["assign", "kernels"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("name", FOR_KERNELS if INTERPRETED else ATTACKS)
def test_exact_ids_are_the_float64_argmin(assign: Assign, name: str) -> None:
    """Exact ties, near ties, offsets, huge and subnormal values."""
    if assign.is_kernel and name not in FOR_KERNELS:
        pytest.skip("too long, or float64, which the kernels do not take")
    assign.alternate(FOR_KERNELS.index(name) if name in FOR_KERNELS else 0)
    x, centroids = attack(name, for_kernels=assign.is_kernel)
    assert_float64_argmin(assign(x, centroids), x, centroids)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(assign: Assign, seed: int) -> None:
    """Any n, K, D, groups, tiles, shares, dtypes, scales and offsets; few levels make ties and duplicates common."""
    choose = random.Random(seed)
    assign.randomise(choose)
    n, k = choose.randint(1, 50 if INTERPRETED else 200), choose.choice((1, 2, 17, 40 if INTERPRETED else 300))
    d, lead = choose.choice((1, 3, 8, 16, 31, 33, 64, 97)), choose.choice(((), (), (1,), (3,)))
    dtype = choose.choice((torch.float16, torch.float32) if INTERPRETED else DTYPES[:3])
    generator = torch.Generator().manual_seed(seed)
    levels = choose.choice((2, 5, 1000))
    values = torch.randint(levels, (*lead, n + k, d), generator=generator) / levels + choose.choice((0.0, 1.0, 100.0))
    values = (values * 10.0 ** (choose.randint(-3, 2) if dtype == torch.float16 else choose.randint(-30, 30))).to(dtype)
    x, centroids = values[..., :n, :], values[..., n:, :].contiguous()
    ids, distances = assign(x, centroids, return_distance=True)
    assert ids.shape == distances.shape == (*lead, n)
    for group in range(*lead or (1,)):
        here = group if lead else ...
        assert_float64_argmin(ids[here], x[here], centroids[here])
        truth = (x[here].double() - centroids[here].double()[ids[here]]).square().sum(-1)
        torch.testing.assert_close(distances[here], truth.float(), rtol=2e-6, atol=d * 2.0**-149)


@pytest.mark.parametrize("exact", [True, False])
def test_ties_go_to_the_lowest_id(assign: Assign, exact: bool) -> None:
    """Within a lane's eight scores, between lanes, warps, tiles and shares of the centroids."""
    for i_config in range(2 if INTERPRETED else 1):
        assign.alternate(i_config)
        centroids = randn(30, 32).half()
        repeated = torch.cat([centroids] * (3 if INTERPRETED else 12))
        assert torch.equal(assign(centroids, repeated, exact=exact), torch.arange(30))
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        assert torch.equal(assign(torch.zeros(7, 2), corners, exact=exact), torch.zeros(7, dtype=torch.int64))
    for first, second in ((3, 5), (3, 12), (40, 70), (100, 200)):
        two = torch.full((260, 8), 5.0)
        two[[first, second]] = 1.0
        assert assign(torch.ones(1, 8), two, exact=exact).item() == first


def test_fast_mode_agrees_on_separated_data(assign: Assign) -> None:
    for i_config, dtype in enumerate((torch.float16, torch.float32)):
        assign.alternate(i_config)
        x, centroids = randn(36, 64).to(dtype), (3 * randn(50, 64, seed=1)).to(dtype)
        ids, distances = assign(x, centroids, exact=False, return_distance=True)
        assert torch.equal(ids, all_distances(x, centroids).argmin(1))
        expected = (x.double() - centroids.double()[ids]).square().sum(1)
        torch.testing.assert_close(distances.double(), expected, rtol=2e-6, atol=0)


def test_fast_mode_really_fails_where_the_exact_mode_does_not(assign: Assign) -> None:
    x, centroids = (values[:36] for values in ATTACKS["two far clouds"]())
    wrong = assign(x, centroids, exact=False) != all_distances(x, centroids).argmin(1)
    assert wrong.float().mean() > 0.3
    assert_float64_argmin(assign(x, centroids), x, centroids)


def test_most_rows_of_clip_like_features_need_no_second_look(kernels: Assign) -> None:
    """Rows around centroids, non-negative: the bound for 4096 features leaves none of them; of pure noise a few."""
    kernels.tiles(AssignConfig(32, 64, 512, 4, 2, False))
    centroids = relu(60, 4096, seed=1)
    x = (centroids[:32] + 0.5 * randn(32, 4096)).relu().half()
    assert kernels.redecided(x, centroids) == (0, 0)
    few, among_all = kernels.redecided(relu(32, 4096).half(), centroids)
    assert few + among_all < 16 and (among_all == 0 or kernels.way == "emulated")


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
def test_shares_of_the_centroids_do_not_change_the_ids(kernels: Assign, shares: int) -> None:
    kernels.tiles(kernels.config, shares)
    x, centroids = relu(50, 32).half(), relu(75 if INTERPRETED else 400, 32, seed=1)
    centroids[-15:] = centroids[:15]
    truth = all_distances(x, centroids).argmin(1)
    assert torch.equal(kernels(x, centroids), truth)
    assert torch.equal(kernels(x, centroids, exact=False), truth)


def test_chunks_of_rows_do_not_change_the_ids(monkeypatch: pytest.MonkeyPatch, assign: Assign) -> None:
    x, centroids = (values.float() for values in near_ties(36 if INTERPRETED else 300, 16, 1e-7))
    options = {"return_distance": True, "return_redecided": True}
    whole = assign(x, centroids, **options)
    for module, name in ((passes, "COPY_BYTES"), (passes, "CHUNK_ROWS"), (assign_reference, "CHUNK_BYTES")):
        monkeypatch.setattr(module, name, 1000 if module is assign_reference else 1)
    pieces = assign(x, centroids, **options)
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[2], pieces[2])
    torch.testing.assert_close(whole[1], pieces[1])


def test_groups_in_several_passes_give_the_same_ids(monkeypatch: pytest.MonkeyPatch, assign: Assign) -> None:
    """Rows that are read where they lie and rows that are copied, whole groups at a time and parts of one."""
    for i_config, dtype in enumerate((torch.float16, torch.float32)):
        assign.alternate(i_config)
        x, centroids = relu(3, 70, 32).to(dtype), relu(3, 20, 32, seed=1)
        whole = assign(x, centroids, return_distance=True)
        for group in range(3):
            alone = assign(x[group], centroids[group], return_distance=True)
            assert_same_bits(alone, tuple(part[group] for part in whole))
        for most in (64, 160):
            monkeypatch.setattr(passes, "CHUNK_ROWS", most)
            assert_same_bits(assign(x, centroids, return_distance=True), whole)


def test_rows_anywhere_in_memory_give_the_same_ids(assign: Assign) -> None:
    x, centroids = relu(50, 64).half(), relu(40, 64, seed=1).half()
    unaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    apart = torch.cat([x, torch.full_like(x, NAN)], dim=1)[:, :64]
    half = torch.stack([x, x], dim=1).view(100, 64)[::2]
    for i_config in range(2 if INTERPRETED else 1):
        config = assign.alternate(i_config)
        expected = assign(x, centroids)
        kinds = [passes.is_direct(v[None], True, config) for v in (x, apart, half, unaligned, x.T.contiguous().T)]
        assert kinds == [True, True, True, False, False]
        for other in (unaligned, apart, x.T.contiguous().T, half):
            assert torch.equal(assign(other, centroids.T.contiguous().T), expected)
        grouped = torch.stack([x, x.flip(0)])
        both = assign(grouped, torch.stack([centroids, centroids]))
        assert torch.equal(both, torch.stack([expected, expected.flip(0)]))
        assert torch.equal(assign(grouped.transpose(0, 1)[:, 0][None], centroids[None])[0], expected)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("dtype", "bad"), [(torch.float16, NAN), (torch.float16, INF), (torch.float32, -INF)], ids=str)
def test_rows_that_are_not_finite_are_named(assign: Assign, exact: bool, dtype: torch.dtype, bad: float) -> None:
    if assign.way == "reference" and not exact:
        pytest.skip("the fast mode of the reference looks at no row")
    x, centroids = randn(40, 32).to(dtype), randn(9, 32, seed=1)
    x[7, 3] = x[31, 0] = bad
    with pytest.raises(ValueError, match=r"^x must be finite, but 2 of its rows .* first are 7, 31;"):
        assign(x, centroids, exact=exact)
    with pytest.raises(ValueError, match=r"^x must be finite, but 2 of its rows .* \(1, 7\), \(1, 31\);"):
        assign(torch.stack([randn(40, 32).to(dtype), x]), torch.stack([centroids, centroids]), exact=exact)
    centroids[5, 31] = bad
    with pytest.raises(ValueError, match=r"centroids must be finite, but 1 of its rows .* first are 5;"):
        assign(x if assign.is_kernel else x.nan_to_num(0, 0, 0), centroids, exact=exact)


def test_no_rows(assign: Assign) -> None:
    ids, distances = assign(torch.zeros(0, 8), randn(3, 8), return_distance=True)
    assert ids.shape == distances.shape == (0,)


def test_another_default_device(assign: Assign) -> None:
    """Everything is made where the rows are, also where near ties are decided again."""
    x, centroids = (values.float() for values in near_ties(60, 16, 1e-9))
    options = {"return_distance": True, "return_redecided": True}
    wanted = assign(x, centroids, **options)
    with default_device("meta"):
        assert_same_bits(assign(x, centroids, **options), wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    clusters=st.integers(1, 20),
    features=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    scale=st.integers(-40, 36),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    levels=st.sampled_from([2, 5, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_exact_for_any_input(
    rows: int, clusters: int, features: int, seed: int, scale: int, offset: float, levels: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few levels make exact ties and duplicates common.
    values = torch.randint(levels, (rows + clusters, features), generator=generator).double() / levels
    values = (values * 10.0**scale + offset * 10.0 ** min(scale, 30)).to(dtype)
    x, centroids = values[:rows], values[rows:]
    assert_float64_argmin(kmeans_assign(x, centroids), x, centroids)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), features=st.sampled_from([3, 50, 700]), spread=st.sampled_from([1e-3, 1.0, 1e4]))
def test_scores_are_within_the_stated_bound(seed: int, features: int, spread: float) -> None:
    shifted, centred = randn(20, features, seed=seed) * spread, randn(30, features, seed=seed + 1)
    scores = torch.addmm(centred.double().square().sum(1).float(), shifted, centred.T, alpha=-2)
    truth = centred.double().square().sum(1) - 2 * shifted.double() @ centred.double().T
    bound = assign_reference._score_error(shifted, centred.double().norm(dim=1).max())
    assert torch.all((scores - truth).abs() <= bound[:, None])


def test_rows_decided_again_are_counted() -> None:
    centroids = randn(200, 16)
    repeated = torch.cat([centroids, centroids[:10]])
    x = centroids[:20].repeat(10, 1)
    ids, distances, again = kmeans_assign(x, repeated, return_distance=True, return_redecided=True)
    assert again.tolist() == [100, 0] and ids.shape == distances.shape == (200,)
    x, centroids = ATTACKS["two far clouds"]()
    few, among_all = kmeans_assign(x, centroids, return_redecided=True)[1].tolist()
    assert few == 0 and among_all > 400
    assert kmeans_assign(x, centroids, exact=False, return_redecided=True)[1].tolist() == [0, 0]


def test_distances_come_from_the_differences() -> None:
    x = randn(200, 16) + 1e4
    ids, distances = kmeans_assign(x, x[:50], return_distance=True)
    assert torch.equal(ids[:50], torch.arange(50))
    assert torch.all(distances[:50] == 0)
    truth = (x.double() - x[:50].double()[ids]).square().sum(1)
    torch.testing.assert_close(distances.double(), truth, rtol=1e-5, atol=0)


def test_no_buffer_of_rows_by_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    """The score matrix is made in chunks no larger than stated."""
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: sizes.append((out := addmm(*a, **k)).nbytes) or out)
    monkeypatch.setattr(assign_reference, "CHUNK_BYTES", 2**16)
    kmeans_assign(randn(5000, 3), randn(64, 3, seed=1))
    assert sum(sizes) >= 5000 * 64 * 4
    assert max(sizes) <= 2**16


def test_caller_settings_do_not_reach_the_exact_mode_and_are_put_back() -> None:
    x, centroids = (values.float() for values in near_ties(200, 64, 1e-6))
    expected = kmeans_assign(x, centroids)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kmeans_assign(x, centroids), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("x", "centroids", "error", "text"),
    [
        (torch.zeros(4, 3), torch.zeros(2, 4), ValueError, "differ in features"),
        (torch.zeros(2, 4, 3), torch.zeros(3, 2, 3), ValueError, "differ in features or in groups"),
        (torch.zeros(4, 3), torch.zeros(2, 2, 3), ValueError, r"must be \(n, D\)"),
        (torch.zeros(3), torch.zeros(3), ValueError, r"must be \(n, D\)"),
        (torch.zeros(4, 3), torch.zeros(0, 3), ValueError, "at least one row"),
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(2, 3), TypeError, "x must be float16.*int32"),
        (torch.zeros(4, 3).numpy(), torch.zeros(4, 3), TypeError, "x must be a torch.Tensor, got numpy.ndarray"),
        (torch.zeros(4, 3), [[0.0] * 3], TypeError, "centroids must be a torch.Tensor, got list"),
    ],
)
def test_assign_refuses(x: Tensor, centroids: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kmeans_assign(x, centroids)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_asking_for_triton_without_a_gpu_says_why() -> None:
    x, ids = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    for call in (
        lambda: kmeans_assign(x, x, backend="triton"),
        lambda: kmeans_update(x, ids, 1, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"'triton' cannot run here: .*(needs a CUDA device, not|not installed)"):
            call()


def test_shares_of_the_centroids_are_a_pure_function() -> None:
    config = launch.kmeans_assign_scores(4096, True, launch.TARGETS[90])
    shares = [launch.kmeans_assign_shares(*sizes, config, 132) for sizes in ((1, 65536, 64), (8, 8192, 512))]
    assert shares == [256, 32]  # few rows: programs of two centroid tiles, and enough to fill the processors
    assert launch.kmeans_assign_shares(1000, 8192, 64, config, 132) == 1
    assert launch.kmeans_assign_shares(1000, 8192, 4096, config, 132) == 8  # the row tiles exceed the cache
    assert launch.kmeans_assign_shares(1000, 100, 4096, config, 132) == 1
    for clusters in range(1, 2000, 37):
        shares, tiles = launch.kmeans_assign_shares(3, clusters, 4096, config, 132), -(-clusters // config.clusters)
        assert 1 <= shares <= tiles and shares == -(-tiles // -(-tiles // shares))


IDS = torch.tensor([0, 2, 2, 0, 2])
OPCHECK_SAMPLES = [
    ("kmeans_assign", (randn(5, 4), randn(3, 4), True, True, "reference")),
    ("kmeans_assign", (randn(5, 4).half(), randn(3, 4), True, False, "reference")),
    ("kmeans_assign", (randn(2, 5, 4), randn(2, 3, 4).double(), False, True, "reference")),
    ("kmeans_assign", (torch.zeros(0, 4), randn(3, 4), True, True, "reference")),
    ("kmeans_update", (randn(5, 4), IDS, 3, True, "reference")),
    ("kmeans_update", (randn(5, 4).double(), IDS, 3, True, "reference")),
    ("kmeans_update", (torch.zeros(0, 4).half(), IDS[:0], 3, True, "reference")),
    ("kmeans_update_add", (randn(5, 4), IDS, torch.ones(3, 4), torch.ones(3, dtype=torch.int64), True, "reference")),
]


@pytest.mark.parametrize(("name", "sample"), OPCHECK_SAMPLES)
def test_opcheck(name: str, sample: tuple) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(getattr(torch.ops.mapet_kernels, name), sample)


def sums_of(x: Tensor, ids: Tensor, clusters: int) -> Tensor:
    return torch.nn.functional.one_hot(ids, clusters).double().T @ x.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_the_float64_sum_rounded_once(dtype: torch.dtype, device: str) -> None:
    x = (randn(4000, 12) + 100).to(device, dtype)
    ids = torch.randint(0, 9, (4000,), generator=torch.Generator().manual_seed(0)).to(device)
    ids[ids == 4] = 5
    sums, counts = kmeans_update(x, ids, 10)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), sums_of(x, ids, 10), rtol=2.0**-23, atol=0)
    assert torch.equal(counts, torch.bincount(ids, minlength=10))
    assert counts[4] == counts[9] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_of_chunks_adds_up_to_that_of_the_whole(dtype: torch.dtype, device: str) -> None:
    x, ids = randn(400, 12).to(device, dtype), (torch.arange(400) % 7).to(device)
    sums, counts = torch.zeros(9, 12, dtype=torch.float64), torch.zeros(9, dtype=torch.int64)
    out = sums.to(device), counts.to(device)
    for start in range(0, 400, 90):
        few = slice(start, start + 90)
        assert kmeans_update(x[few], ids[few], 9, out=out) is out
    torch.testing.assert_close(out[0], sums_of(x, ids, 9), rtol=1e-13, atol=1e-13)
    assert torch.equal(out[1], torch.bincount(ids, minlength=9))


def test_update_adds_under_torch_compile() -> None:
    x, ids = randn(50, 4), torch.arange(50) % 3

    def twice(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = kmeans_update(x, ids, 3)
        return kmeans_update(x, ids, 3, out=out)

    expected = kmeans_update(x, ids, 3)
    sums, counts = torch.compile(twice, fullgraph=True, backend="aot_eager")(x, ids)
    torch.testing.assert_close(sums, 2 * expected[0])
    assert torch.equal(counts, 2 * expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_update_gives_the_same_bits_every_time(device: str) -> None:
    x, ids = randn(20_000, 8).to(device), torch.randint(0, 5, (20_000,)).to(device)
    first = kmeans_update(x, ids, 5)[0]
    assert all(torch.equal(kmeans_update(x, ids, 5)[0], first) for _ in range(5))


def test_update_in_chunks_and_of_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = randn(500, 6), torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    whole = kmeans_update(x, ids, 40)
    monkeypatch.setattr(update_reference, "CHUNK_BYTES", 6 * 8 * 7)
    torch.testing.assert_close(kmeans_update(x, ids, 40), whole)
    sums, counts = kmeans_update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2)
    assert (sums.tolist(), counts.tolist()) == ([[0.0] * 3] * 2, [0, 0])


COUNTS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "ids", "options", "error", "text"),
    [
        (torch.zeros(4, 3), torch.arange(4), {}, ValueError, r"\[0, 3\), got values from 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), {}, ValueError, r"got values from -1 to 0"),
        (torch.zeros(4, 3), torch.tensor([0, 1]), {}, ValueError, r"x must be \(n, D\) and ids \(n,\)"),
        (torch.zeros(2, 3), torch.tensor([0, 1]).int(), {}, TypeError, "ids must be int64"),
        (torch.zeros(2, 3), torch.tensor([0, 1]).numpy(), {}, TypeError, "ids must be a torch.Tensor, got numpy.nda"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"clusters": 0}, ValueError, "at least one cluster"),
        (randn(5, 4), IDS, {"out": (torch.zeros(3, 2), COUNTS)}, ValueError, r"out must be \(3, 4\) and \(3,\)"),
        (randn(5, 4), IDS, {"out": (torch.zeros(3, 4).half(), COUNTS)}, TypeError, "torch.float32 or torch.float64"),
        (randn(5, 4), IDS, {"out": (torch.zeros(3, 4), torch.zeros(3))}, TypeError, "and torch.int64 for torch.flo"),
        (randn(5, 4), IDS, {"out": (torch.zeros(4, 3).T, COUNTS)}, ValueError, "contiguous"),
    ],
)
def test_update_refuses(x: Tensor, ids: Tensor, options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kmeans_update(x, ids, **{"clusters": 3, **options})
