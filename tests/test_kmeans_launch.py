"""Tiles of the k-means score kernel: chosen within a device's shared memory."""

from __future__ import annotations

import pytest
import torch

from mapet_kernels import launch, triton_launch
from mapet_kernels.kmeans_assign import passes
from mapet_kernels.launch import TARGETS, Target

HOPPER_OF_99 = Target(90, 99 * 1024)
"""No such GPU: wgmma, with as little shared memory as a consumer card."""


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("features", [16, 64, 512, 4096])
@pytest.mark.parametrize(
    "target", [*TARGETS.values(), HOPPER_OF_99, Target(86, 64 * 1024), Target(90, 48 * 1024)], ids=str
)
def test_tiles_fit_the_shared_memory_of_the_device(target: Target, features: int, exact: bool) -> None:
    config = launch.kmeans_assign_scores(features, exact, target)
    assert launch.kmeans_assign_bytes(config) <= target.shared_memory
    assert config.stages >= 2 and config.rows >= 32
    assert not config.descriptors or target.has_wgmma


def test_tiles_are_not_smaller_than_they_must_be() -> None:
    """A Hopper GPU's own fill half of its memory at least; with less, stages go first."""
    for exact in (True, False):
        whole, less = (launch.kmeans_assign_scores(4096, exact, target) for target in (TARGETS[90], HOPPER_OF_99))
        assert launch.kmeans_assign_bytes(whole) > 192 * 1024
        assert (whole.rows, whole.clusters) == (less.rows, less.clusters) and less.stages < whole.stages


def test_too_little_shared_memory_is_said() -> None:
    with pytest.raises(ValueError, match=r"kmeans_assign needs \d+ bytes of shared memory, .* gives a program 8192"):
        launch.kmeans_assign_scores(4096, True, Target(80, 8192))


def test_the_device_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 5090 as torch describes it: newer than a Hopper, and with the tiles of an Ampere."""
    properties = type("Properties", (), {"major": 12, "minor": 0, "shared_memory_per_block_optin": 101_376})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(triton_launch, "_target_of_gpu", triton_launch._target_of_gpu.__wrapped__)
    backend = pytest.importorskip("mapet_kernels.kmeans_assign.triton_backend")
    config = backend._config(4096, True, torch.device("cuda", 0))
    assert not config.descriptors and launch.kmeans_assign_bytes(config) <= 101_376


def test_passes_hold_no_more_rows_than_can_be_counted() -> None:
    """Groups whose rows lie where they are read, too: 3 of 2^30 rows go in passes that 32 bits can count."""
    config = launch.kmeans_assign_scores(64, True, TARGETS[90])
    x = torch.empty(1, dtype=torch.float16).expand(3, 2**30, 64)
    most = passes.rows_of_a_pass(x, True, config)
    parts = list(passes.pieces(3, 2**30, most))
    assert most * launch.kmeans_assign_shares(1, 8192, 64, config, 132) * config.capacity < 2**31
    assert all(few.stop - few.start == 1 and rows.stop - rows.start <= most for few, rows in parts)
    assert sum(rows.stop - rows.start for _, rows in parts) == 3 * 2**30


@pytest.mark.parametrize(
    ("groups", "n", "most"), [(1, 7, 3), (5, 7, 16), (5, 7, 7), (4, 16, 8), (3, 1, 100), (2, 9, 8)]
)
def test_pieces_are_every_row_of_every_group_once(groups: int, n: int, most: int) -> None:
    seen = torch.zeros(groups, n, dtype=torch.int64)
    for few, rows in passes.pieces(groups, n, most):
        part = seen[few, rows]
        assert 0 < part.numel() <= most and (len(part) == 1 or part.shape[1] == n)
        part += 1
    assert (seen == 1).all()
