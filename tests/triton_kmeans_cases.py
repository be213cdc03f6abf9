"""The Triton kernels of k-means in Triton's interpreter; test_triton_interpreter.py runs this file."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kmeans_checks import (
    DESCRIPTORS,
    POINTERS,
    all_distances,
    assert_float64_argmin,
    cut_off_attack,
    randn,
    relu,
    use_tiles,
)
from op_checks import poisoned
from torch import Tensor
from triton.runtime import interpreter

from mapet_kernels import kmeans_assign, kmeans_update, launch
from mapet_kernels.kmeans_assign import bound, kernel, passes, triton_backend
from mapet_kernels.kmeans_assign.triton_backend import Found
from mapet_kernels.kmeans_update import triton_backend as update_backend
from mapet_kernels.launch import AssignConfig
from mapet_kernels.triton_launch import Launch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poisoned():
        yield


def assign(x: Tensor, centroids: Tensor, **options):
    return kmeans_assign(x, centroids, backend="triton", **options)


def redecided(x: Tensor, centroids: Tensor) -> tuple[int, int]:
    """Rows decided again among a few centroids, and among all; the ids are checked on the way."""
    ids, counts = assign(x, centroids, return_redecided=True)
    assert_float64_argmin(ids, x, centroids)
    return tuple(counts.tolist())


@pytest.mark.parametrize("architecture", (80, 90))
def test_tiles_of_the_launch_table(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    use_tiles(monkeypatch, launch.kmeans_assign_scores(128, True, launch.TARGETS[architecture]))
    x, centroids = relu(40, 128).half(), relu(140, 128, seed=1)
    assert redecided(x, centroids)[1] == 0


def test_8192_features(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, AssignConfig(16, 16, 512, 4, 2, False))
    x, centroids = relu(5, 8192), relu(7, 8192, seed=1)
    assert redecided(x, centroids)[1] == redecided(x.half(), centroids)[1] == 0


def sparse(folder: Path, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor in a file of holes, which takes no memory but where it is written to."""
    return torch.from_file(str(folder / name), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def test_lists_beyond_2_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """20 rows as the first of 2^29, in five shares: the last share's lists begin at 2^31, where 32 bits wrap."""
    config, shares, most = replace(POINTERS, capacity=1), 5, 2**29
    use_tiles(monkeypatch, config, shares)
    x, centroids = relu(1, 20, 32).half(), relu(1, 80, 32, seed=1)
    part, prepared = triton_backend.centroids_launch(centroids, x.dtype, True, config)
    part.run(x.device)
    for exact in (True, False):
        found = Found(
            sparse(tmp_path, f"best{exact}", torch.float32, shares, *[1] * exact, most),
            sparse(tmp_path, f"ids{exact}", torch.int32, shares, *[1] * exact, most),
            sparse(tmp_path, "held", torch.int32, shares, most) if exact else None,
            sparse(tmp_path, "reach", torch.float32, shares, most) if exact else None,
        )
        part, rows = triton_backend.rows_launch(x, prepared, True, exact, config)
        if part is not None:
            part.run(x.device)
        monkeypatch.setattr(triton_backend, "_empty_found", lambda *_, found=found: found)
        scores, _ = triton_backend.scores_launch(rows, prepared, 20, exact, config, 1)
        counted = scores.kernel.arg_names.index("rows")
        arguments = [*scores.arguments[:counted], most, *scores.arguments[counted + 1 :]]
        replace(scores, arguments=tuple(arguments)).run(x.device)
        nearest, status = torch.empty(20, dtype=torch.int64), torch.empty(20, dtype=torch.int8)
        lists = found.best, found.ids, found.held, found.reach
        # Programs of 4 rows, so that no more rows than there are results are merged.
        constants = {"EXACT": exact, "CAPACITY": 1, "BLOCK": 4}
        Launch(kernel.merge_kernel, 5, (*lists, nearest, status, most, shares), constants).run(x.device)
        if exact:
            status.fill_(passes.UNDECIDED)  # have all decided, among what the lists hold
            flagged, sizes = torch.arange(20), (*x.stride(), *centroids.stride(), 20, most, 32, shares)
            constants = {"CAPACITY": 1, "BLOCK": 32}
            decided = torch.zeros_like(nearest)
            arguments = x, centroids, flagged, status, *lists, decided, *sizes
            Launch(kernel.decide_kernel, 20, arguments, constants).run(x.device)
            assert torch.equal(decided, all_distances(x[0], centroids[0]).argmin(1))
        assert torch.equal(nearest, all_distances(x[0], centroids[0]).argmin(1))
        assert (nearest >= 64).any(), "the last share holds none of them, so nothing was shown"


@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
def test_what_is_decided_again_is_counted(monkeypatch: pytest.MonkeyPatch, config: AssignConfig) -> None:
    use_tiles(monkeypatch, config)
    x = randn(40, 64)
    assert redecided(x, x[:8] * 10) == (0, 0)
    twins = torch.cat([x[:8], x[:8]])
    if config.capacity > 2:
        assert redecided(x, twins) == (40, 0)
    crowd = torch.cat([x[:1]] * (config.capacity + 1) + [x[1:8]])
    few, all_of_them = redecided(x[:1].repeat(40, 1), crowd)
    assert (few, all_of_them) == (0, 40)


def cut_off(values: np.ndarray, quantum: np.ndarray) -> np.ndarray:
    return np.trunc(values / quantum) * quantum


def worst_product(a: np.ndarray, b: np.ndarray, accumulator: np.ndarray) -> np.ndarray:
    """a (M, K) @ b (K, N) + accumulator on the worst tensor core that the bound allows: 4 products at a time."""
    a, b, total = a.astype(np.float64), b.astype(np.float64), accumulator.astype(np.float64)
    for k in range(0, a.shape[1], 4):
        terms = a[:, k : k + 4, None] * b[None, k : k + 4]  # (M, 4, N)
        terms = np.concatenate([terms, total[:, None]], axis=1)
        largest = np.abs(terms).max(1, keepdims=True)
        quantum = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 23)
        total = cut_off(terms, quantum).sum(1)
        total = cut_off(total, 2.0 ** (np.floor(np.log2(np.where(total != 0, np.abs(total), 1.0))) - 23))
    return total.astype(np.float32)


@pytest.fixture
def worst_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dot(builder, a, b, d, *_):
        return interpreter.TensorHandle(worst_product(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_exact_on_the_worst_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, worst_tensor_cores: None, dtype: torch.dtype
) -> None:
    use_tiles(monkeypatch, AssignConfig(64, 64, 128, 4, 2, False, capacity=8))
    for x, centroids in (cut_off_attack(dtype), (relu(40, 512).to(dtype), relu(30, 512, seed=1))):
        assert_float64_argmin(assign(x, centroids), x, centroids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 100.0])
def test_scores_are_within_the_stated_bound(dtype: torch.dtype, spread: float) -> None:
    """|score - P^2 S| <= r a + z with the operands as the kernels round them and the worst tensor cores."""
    x = (relu(24, 200) * spread + 1).to(dtype)
    centroids = relu(30, 200, seed=1) * spread + 1
    scores, width, truth = scores_and_bound(x, centroids)
    assert torch.all((scores - truth).abs() <= width)
    assert (scores - truth).abs().max() > 0.002 * width.max()


def scores_and_bound(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, K) float64: the scores in the kernel's arithmetic, their error bound, and P^2 S_k."""
    direct = passes.is_direct(x[None], True, POINTERS)
    part, prepared = triton_backend.centroids_launch(centroids[None], x.dtype, direct, POINTERS)
    part.run(x.device)
    part, rows = triton_backend.rows_launch(x[None], prepared, direct, True, POINTERS)
    part.run(x.device)
    clusters = len(centroids)
    product = worst_product(rows.values.numpy(), prepared.values.numpy().T, np.zeros((len(x), len(prepared.values))))
    slack, slope, bias = (values[:clusters].double() for values in (prepared.slack, prepared.slope, prepared.bias))
    scores = torch.from_numpy(product).double()[:, :clusters] * rows.scale[:, None].double() + (bias + slack)
    width = rows.radius[:, None].double() * slope + slack
    scale = 2.0 ** (13 - torch.frexp(prepared.largest[0])[1].item() + 1)
    mean = prepared.mean[0].double()
    moved = centroids.double() - mean
    constant = mean if x.dtype == torch.float16 else 0 * mean
    own = x.double() - (mean - constant)
    truth = moved.square().sum(1) + 2 * moved @ constant - 2 * own @ moved.T
    return scores, width, truth * scale**2


def test_without_the_bound_the_ids_would_be_wrong(monkeypatch: pytest.MonkeyPatch, worst_tensor_cores: None) -> None:
    """The attack has teeth: the fast pass on the same data is wrong."""
    use_tiles(monkeypatch, AssignConfig(64, 64, 128, 4, 2, False))
    x, centroids = cut_off_attack(torch.float16)
    wrong = assign(x, centroids, exact=False) != all_distances(x, centroids).argmin(1)
    assert wrong.any()


def test_what_the_kernels_do_not_take_is_refused() -> None:
    x, centroids = randn(4, 3), randn(2, 3)
    with pytest.raises(TypeError, match=r"takes float16, bfloat16 and float32, got float64"):
        assign(x.double(), centroids)
    with pytest.raises(ValueError, match=r"wrong.* in bfloat16|computes bfloat16 wrongly"):
        assign(x.bfloat16(), centroids.bfloat16())
    with pytest.raises(ValueError, match=r"wrong.* in bfloat16|computes bfloat16 wrongly"):
        kmeans_update(x.bfloat16(), torch.zeros(4, dtype=torch.int64), 1, backend="triton")


def exact_sums(x: Tensor, ids: Tensor, clusters: int) -> Tensor:
    return torch.zeros(clusters, x.shape[1], dtype=torch.float64).index_add_(0, ids, x.double())


UPDATE_SHAPES = [(1, 1, 1), (97, 41, 13), (11, 64, 33), (203, 2, 7), (160, 1, 130), (0, 3, 4), (129, 3, 1)]


@pytest.mark.parametrize(("n", "clusters", "features"), UPDATE_SHAPES)
def test_update_is_the_float64_sum_rounded_once(
    monkeypatch: pytest.MonkeyPatch, n: int, clusters: int, features: int
) -> None:
    monkeypatch.setattr(update_backend, "PIECE", 32)
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = (randn(n, features) + 100).to(dtype)
        ids = torch.randint(0, clusters, (n,), generator=torch.Generator().manual_seed(n))
        sums, counts = kmeans_update(x, ids, clusters, backend="triton")
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        rounding = 2.0**-45 if dtype == torch.float64 else 2.0**-24
        torch.testing.assert_close(sums.double(), exact_sums(x, ids, clusters), rtol=1.01 * rounding, atol=0)
        assert torch.equal(counts, ids.bincount(minlength=clusters))


def test_update_of_ids_that_nobody_checked_stays_within_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids out of range are in no sum; the others are summed as ever."""
    monkeypatch.setattr(update_backend, "PIECE", 8)
    ids = torch.randint(0, 3, (100,), generator=torch.Generator().manual_seed(0))
    bad = torch.tensor([-1, -(2**31), 3, 10**6, 2**31 - 1]).repeat(10)
    x, given = randn(150, 5), torch.cat([ids, bad])
    sums, counts = kmeans_update(x, given, 3, check_ids=False, backend="triton")
    torch.testing.assert_close(sums.double(), exact_sums(x[:100], ids, 3), rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, ids.bincount(minlength=3))


def test_update_gives_the_same_bits_every_time_and_for_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_backend, "PIECE", 16)
    x, ids = randn(150, 40), torch.randint(0, 3, (150,), generator=torch.Generator().manual_seed(1))
    first = kmeans_update(x, ids, 3, backend="triton")[0]
    for other in (x, x.T.contiguous().T, torch.stack([x, x], dim=2).flatten(1)[:, ::2]):
        assert torch.equal(kmeans_update(other, ids, 3, backend="triton")[0], first)


@pytest.mark.parametrize("seed", range(6))
def test_update_of_random_clusters_in_chunks(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Skewed cluster sizes, pieces that end anywhere: sums of chunks, added in place, are those of the whole."""
    choose = random.Random(seed)
    monkeypatch.setattr(update_backend, "PIECE", choose.choice((1, 2, 5, 16)))
    monkeypatch.setattr(update_backend, "STEP", choose.choice((1, 4, 16)))
    n, clusters, features = choose.randint(1, 90), choose.randint(1, 9), choose.choice((1, 5, 17))
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(n, generator=generator) ** 3 * clusters).long()
    x = randn(n, features, seed=seed)
    truth = exact_sums(x, ids, clusters)
    torch.testing.assert_close(
        kmeans_update(x, ids, clusters, backend="triton")[0], truth.float(), rtol=2e-7, atol=1e-7
    )
    out = torch.zeros(clusters, features, dtype=torch.float64), torch.zeros(clusters, dtype=torch.int64)
    for start in range(0, n, 23):
        few = slice(start, start + 23)
        assert kmeans_update(x[few], ids[few], clusters, out=out, backend="triton") is out
    torch.testing.assert_close(out[0], truth, rtol=1e-13, atol=1e-13)
    assert torch.equal(out[1], ids.bincount(minlength=clusters))


def test_opcheck_of_the_triton_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, POINTERS)
    ops = SimpleNamespace(assign=torch.ops.mapet_kernels.kmeans_assign, add=torch.ops.mapet_kernels.kmeans_update_add)
    torch.library.opcheck(ops.assign, (randn(2, 5, 4).half(), randn(2, 3, 4), True, True, "triton"))
    out = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    torch.library.opcheck(ops.add, (randn(5, 4), torch.tensor([0, 2, 2, 0, 2]), *out, True, "triton"))


@pytest.mark.parametrize(
    ("dtype", "direct"), [(torch.float16, True), (torch.float16, False), (torch.float32, False)], ids=str
)
def test_preparation_in_torch_is_that_of_the_kernels(dtype: torch.dtype, direct: bool) -> None:
    """Operands bit for bit; coefficients of the bound, sums in another order, but for their own rounding."""
    x, centroids = relu(2, 37, 64).to(dtype), 3 * relu(2, 21, 64, seed=1) + 1
    part, prepared = triton_backend.centroids_launch(centroids, dtype, direct, POINTERS)
    part.run(x.device)
    plain = bound.centroids_of(centroids, dtype, direct, POINTERS.clusters, POINTERS.features)
    part, rows = triton_backend.rows_launch(x, prepared, direct, True, POINTERS)
    part.run(x.device)
    plain_rows = bound.rows_of(x, plain, direct)
    assert torch.equal(plain.values, prepared.values) and torch.equal(plain_rows.values, rows.values)
    assert torch.equal(plain_rows.scale, rows.scale)
    pairs = [(plain_rows.radius, rows.radius)]
    pairs += [(getattr(plain, name), getattr(prepared, name)) for name in ("bias", "slope", "slack", "mean", "largest")]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_statuses_are_what_the_launches_take_them_for() -> None:
    assert (kernel.UNDECIDED.value, kernel.OPEN.value) == (passes.UNDECIDED, passes.OPEN) == (1, 2)
