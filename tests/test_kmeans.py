"""kmeans_assign and kmeans_update: the float64 argmin under attack, exact sums."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapet_kernels import kmeans_assign, kmeans_update, launch
from mapet_kernels.kmeans_assign import reference as assign_reference
from mapet_kernels.kmeans_update import reference as update_reference

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """(n, K) float64 squared distances from the differences, of values scaled by an exact power of two."""
    largest = max(x.abs().max().item(), centroids.abs().max().item())
    half = 2.0 ** -(math.frexp(largest)[1] // 2)
    x, centroids = (values.double().cpu() * half * half for values in (x, centroids))
    return torch.stack([(x - centroid).square().sum(1) for centroid in centroids], dim=1)


def assert_float64_argmin(ids: Tensor, x: Tensor, centroids: Tensor) -> None:
    """Each id is the float64 argmin; a row tied to float64 rounding may hold any of the tied ids."""
    distances = all_distances(x, centroids)
    chosen = distances.gather(1, ids.cpu()[:, None]).squeeze(1)
    smallest = distances.min(1).values
    rounding = 4 * x.shape[1] * 2.0**-53
    assert torch.all(chosen <= smallest * (1 + rounding)), f"rows {(chosen > smallest).nonzero().flatten()[:5]}"


def near_ties(rows: int, features: int, gap: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 rows between two of many centroids: nearer to one of the two by the relative gap, on a random side."""
    centroids = randn(24, features, seed=seed).double()
    pairs = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i))[:2] for i in range(rows)])
    side = torch.where(randn(rows, seed=seed + 1) > 0, 1.0, -1.0)[:, None].double()
    a, b = centroids[pairs[:, 0]], centroids[pairs[:, 1]]
    return (a + b) / 2 + side * gap * (a - b), centroids


def clouds(rows: int, features: int, distance: float) -> Tensor:
    """Rows of two clouds of width 1 whose centres are far apart."""
    return randn(rows, features) + distance * (torch.arange(rows) % 2)[:, None]


ADVERSARIAL = {
    "plain": lambda: (randn(500, 37), randn(50, 37, seed=1)),
    "one feature": lambda: (randn(500, 1), randn(50, 1, seed=1)),
    "one centroid": lambda: (randn(50, 9), randn(1, 9, seed=1)),
    "near ties in fp32": lambda: tuple(v.float() for v in near_ties(300, 64, 1e-7)),
    "near ties below fp32": lambda: near_ties(300, 64, 1e-12),
    "near ties, mixed dtypes": lambda: (near_ties(300, 64, 1e-9)[0], near_ties(300, 64, 1e-9)[1].float()),
    "near ties, long rows": lambda: tuple(v.float() for v in near_ties(40, 4096, 1e-7)),
    "common offset": lambda: (randn(500, 37) + 1e6, randn(50, 37, seed=1) + 1e6),
    "post-ReLU": lambda: (randn(200, 512).relu(), randn(64, 512, seed=1).relu()),
    "post-ReLU, offset channel": lambda: (
        randn(200, 64).relu() + 3e4 * torch.eye(64)[5],
        randn(64, 64, seed=1).relu() + 3e4 * torch.eye(64)[5],
    ),
    "two far clouds": lambda: (clouds(500, 37, 1e6), clouds(50, 37, 1e6)),
    "one far centroid": lambda: (randn(500, 37), torch.cat([randn(50, 37, seed=1), torch.full((1, 37), 1e8)])),
    "huge": lambda: (randn(500, 37) * 1e37, randn(50, 37, seed=1) * 1e37),
    "tiny": lambda: (randn(500, 37) * 1e-36, randn(50, 37, seed=1) * 1e-36),
    "subnormal": lambda: (randn(500, 37) * 1e-41, randn(50, 37, seed=1) * 1e-41),
    "tiny beside large": lambda: (randn(500, 37) * 1e-18, torch.cat([randn(20, 37), randn(20, 37, seed=1) * 1e-18])),
    "float64 huge": lambda: (randn(500, 37).double() * 1e306, randn(50, 37, seed=1).double() * 1e306),
    "centroids are rows": lambda: (randn(300, 20), randn(300, 20)[::7]),
    "one repeated row": lambda: (torch.ones(300, 5), torch.cat([torch.zeros(3, 5), torch.ones(4, 5)])),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_exact_ids_are_the_float64_argmin(case: str, device: str) -> None:
    x, centroids = (values.to(device) for values in ADVERSARIAL[case]())
    assert_float64_argmin(kmeans_assign(x, centroids), x, centroids)


def test_fast_mode_really_fails_where_the_exact_mode_does_not() -> None:
    x, centroids = ADVERSARIAL["two far clouds"]()
    wrong = kmeans_assign(x, centroids, exact=False) != all_distances(x, centroids).argmin(1)
    assert wrong.float().mean() > 0.5


def test_fast_mode_agrees_on_separated_data() -> None:
    x, centroids = ADVERSARIAL["plain"]()
    assert torch.equal(kmeans_assign(x, centroids, exact=False), all_distances(x, centroids).argmin(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dtypes(dtype: torch.dtype) -> None:
    x, centroids = randn(300, 24).to(dtype), randn(40, 24, seed=1).to(dtype)
    ids, distances = kmeans_assign(x, centroids, return_distance=True)
    assert ids.dtype == torch.int64
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_float64_argmin(ids, x, centroids)


def test_half_features_with_fp32_centroids() -> None:
    x, centroids = randn(300, 24).half(), randn(40, 24, seed=1)
    assert_float64_argmin(kmeans_assign(x, centroids), x, centroids)


@pytest.mark.parametrize("exact", [True, False])
def test_exact_ties_go_to_the_lowest_id(exact: bool) -> None:
    centroids = randn(6, 8)
    repeated = torch.cat([centroids, centroids, centroids])
    assert torch.equal(kmeans_assign(centroids, repeated, exact=exact), torch.arange(6))


def test_symmetric_ties_go_to_the_lowest_id() -> None:
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert torch.equal(kmeans_assign(torch.zeros(7, 2), corners), torch.zeros(7, dtype=torch.int64))


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
    x, centroids = ADVERSARIAL["two far clouds"]()
    few, among_all = kmeans_assign(x, centroids, return_redecided=True)[1].tolist()
    assert few == 0 and among_all > 400
    assert kmeans_assign(x, centroids, exact=False, return_redecided=True)[1].tolist() == [0, 0]


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


@pytest.mark.parametrize("name", ["kmeans_assign", "kmeans_update"])
def test_asking_for_triton_without_a_gpu_says_why(name: str) -> None:
    x, ids = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*(needs a CUDA device, not cpu|not installed)"):
        kmeans_assign(x, x, backend="triton") if name == "kmeans_assign" else kmeans_update(x, ids, 1, backend="triton")


def test_batched_equals_one_by_one() -> None:
    x, centroids = randn(3, 50, 8), randn(3, 7, 8, seed=1)
    ids, distances = kmeans_assign(x, centroids, return_distance=True)
    assert ids.shape == distances.shape == (3, 50)
    for group in range(3):
        alone = kmeans_assign(x[group], centroids[group], return_distance=True)
        assert torch.equal(ids[group], alone[0])
        assert torch.equal(distances[group], alone[1])


def test_strided_inputs() -> None:
    x, centroids = randn(24, 300).T, randn(24, 80, seed=1).T[::2]
    assert torch.equal(kmeans_assign(x, centroids), kmeans_assign(x.contiguous(), centroids.contiguous()))


def test_distances_come_from_the_differences() -> None:
    x = randn(200, 16) + 1e4
    ids, distances = kmeans_assign(x, x[:50], return_distance=True)
    assert torch.equal(ids[:50], torch.arange(50))
    assert torch.all(distances[:50] == 0)
    truth = (x.double() - x[:50].double()[ids]).square().sum(1)
    torch.testing.assert_close(distances.double(), truth, rtol=1e-5, atol=0)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, centroids = near_ties(300, 40, 1e-8)
    x, centroids = x.float(), centroids.float()
    whole = kmeans_assign(x, centroids, return_distance=True)
    monkeypatch.setattr(assign_reference, "CHUNK_BYTES", 1000)
    pieces = kmeans_assign(x, centroids, return_distance=True)
    assert torch.equal(whole[0], pieces[0])
    torch.testing.assert_close(whole[1], pieces[1])


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["x", "centroids"])
def test_rows_that_are_not_finite_are_named(which: str, bad: float) -> None:
    values = {"x": randn(20, 4), "centroids": randn(20, 4, seed=1)}
    values[which][[3, 11], 2] = bad
    with pytest.raises(ValueError, match=rf"^{which} must be finite, but 2 of its rows .* first are 3, 11;"):
        kmeans_assign(**values)


def test_rows_that_are_not_finite_are_named_with_their_group() -> None:
    x = randn(2, 5, 4)
    x[1, 3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"first are \(1, 3\);"):
        kmeans_assign(x, randn(2, 3, 4))


@pytest.mark.parametrize(
    ("x", "centroids", "error", "text"),
    [
        (torch.zeros(4, 3), torch.zeros(2, 4), ValueError, "differ in features"),
        (torch.zeros(2, 4, 3), torch.zeros(3, 2, 3), ValueError, "differ in features or in groups"),
        (torch.zeros(4, 3), torch.zeros(2, 2, 3), ValueError, r"must be \(n, D\)"),
        (torch.zeros(3), torch.zeros(3), ValueError, r"must be \(n, D\)"),
        (torch.zeros(4, 3), torch.zeros(0, 3), ValueError, "at least one row"),
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(2, 3), TypeError, "x must be float16.*int32"),
    ],
)
def test_assign_refuses(x: Tensor, centroids: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kmeans_assign(x, centroids)


def test_what_is_no_tensor_is_told_so() -> None:
    x, ids = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got numpy.ndarray"):
        kmeans_assign(x.numpy(), x)
    with pytest.raises(TypeError, match=r"centroids must be a torch.Tensor, got list"):
        kmeans_assign(x, x.tolist())
    with pytest.raises(TypeError, match=r"ids must be a torch.Tensor, got numpy.ndarray"):
        kmeans_update(x, ids.numpy(), 2)


def test_another_default_device() -> None:
    """Everything is made where the rows are, whatever torch's default device."""
    x, centroids = near_ties(60, 16, 1e-9)
    x, centroids, ids = x.float(), centroids.float(), torch.arange(60) % 7
    wanted = kmeans_assign(x, centroids, return_distance=True, return_redecided=True), kmeans_update(x, ids, 7)
    torch.set_default_device("meta")
    try:
        found = kmeans_assign(x, centroids, return_distance=True, return_redecided=True), kmeans_update(x, ids, 7)
    finally:
        torch.set_default_device(None)
    for one, other in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_unknown_backends_are_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'cuda9'; backends are auto, reference"):
        kmeans_assign(torch.zeros(4, 3), torch.zeros(2, 3), backend="cuda9")
    with pytest.raises(ValueError, match=r"unknown backend 'cuda9'; backends are auto, reference"):
        kmeans_update(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), 2, backend="cuda9")


def test_no_rows() -> None:
    ids, distances = kmeans_assign(torch.zeros(0, 3), torch.zeros(2, 3), return_distance=True)
    assert ids.shape == distances.shape == (0,)
    sums, counts = kmeans_update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2)
    assert sums.tolist() == [[0.0] * 3] * 2
    assert counts.tolist() == [0, 0]


OPCHECK_SAMPLES = {
    "kmeans_assign": [
        (randn(5, 4), randn(3, 4), True, True, "reference"),
        (randn(5, 4).half(), randn(3, 4), True, False, "reference"),
        (randn(2, 5, 4), randn(2, 3, 4).double(), False, True, "reference"),
        (torch.zeros(0, 4), randn(3, 4), True, True, "reference"),
    ],
    "kmeans_update": [
        (randn(5, 4), torch.tensor([0, 2, 2, 0, 2]), 3, True, "reference"),
        (randn(5, 4).double(), torch.tensor([0, 2, 2, 0, 2]), 3, True, "reference"),
        (torch.zeros(0, 4).half(), torch.zeros(0, dtype=torch.int64), 3, True, "reference"),
    ],
    "kmeans_update_add": [
        (
            randn(5, 4),
            torch.tensor([0, 2, 2, 0, 2]),
            torch.ones(3, 4),
            torch.ones(3, dtype=torch.int64),
            True,
            "reference",
        ),
    ],
}


@pytest.mark.parametrize(("name", "sample"), [(name, s) for name, group in OPCHECK_SAMPLES.items() for s in group])
def test_opcheck(name: str, sample: tuple) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(getattr(torch.ops.mapet_kernels, name), sample)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_the_float64_sum_rounded_once(dtype: torch.dtype, device: str) -> None:
    x = (randn(4000, 12) + 100).to(device, dtype)
    ids = torch.randint(0, 9, (4000,), generator=torch.Generator().manual_seed(0)).to(device)
    ids[ids == 4] = 5
    sums, counts = kmeans_update(x, ids, 10)
    one_hot = torch.nn.functional.one_hot(ids, 10).double()
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), one_hot.T @ x.double(), rtol=2.0**-23, atol=0)
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
    one_hot = torch.nn.functional.one_hot(ids, 9).double()
    torch.testing.assert_close(out[0], one_hot.T @ x.double(), rtol=1e-13, atol=1e-13)
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


@pytest.mark.parametrize(
    ("sums", "counts", "error", "text"),
    [
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), ValueError, r"out must be \(3, 4\) and \(3,\)"),
        (torch.zeros(3, 4).half(), torch.zeros(3, dtype=torch.int64), TypeError, "torch.float32 or torch.float64"),
        (torch.zeros(3, 4), torch.zeros(3), TypeError, "and torch.int64 for torch.float32 rows"),
        (torch.zeros(4, 3).T, torch.zeros(3, dtype=torch.int64), ValueError, "contiguous"),
    ],
)
def test_update_refuses_what_it_cannot_add_to(sums: Tensor, counts: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kmeans_update(randn(5, 4), torch.arange(5) % 3, 3, out=(sums, counts))


@pytest.mark.parametrize("device", DEVICES)
def test_update_gives_the_same_bits_every_time(device: str) -> None:
    x, ids = randn(20_000, 8).to(device), torch.randint(0, 5, (20_000,)).to(device)
    first = kmeans_update(x, ids, 5)[0]
    assert all(torch.equal(kmeans_update(x, ids, 5)[0], first) for _ in range(5))


def test_update_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = randn(500, 6), torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    whole = kmeans_update(x, ids, 40)
    monkeypatch.setattr(update_reference, "CHUNK_BYTES", 6 * 8 * 7)
    pieces = kmeans_update(x, ids, 40)
    torch.testing.assert_close(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize(
    ("x", "ids", "clusters", "error", "text"),
    [
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), 3, ValueError, r"\[0, 3\), got values from 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), 3, ValueError, r"got values from -1 to 0"),
        (torch.zeros(4, 3), torch.tensor([0, 1]), 3, ValueError, r"x must be \(n, D\) and ids \(n,\)"),
        (torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.int32), 3, TypeError, "ids must be int64"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), 0, ValueError, "at least one cluster"),
    ],
)
def test_update_refuses(x: Tensor, ids: Tensor, clusters: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kmeans_update(x, ids, clusters)
