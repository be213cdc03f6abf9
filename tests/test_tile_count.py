"""bench/tile_count.py: tiles with and without a mask, against hand counts and against the kernels themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import tile_count
from bench.tile_count import Tiles

FOLDER = Path(__file__).parent


def test_counts_are_those_of_the_kernels() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "triton_tile_cases.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_hand_counts_at_the_target() -> None:
    seen = tile_count.two_stream(197, 50)
    assert (seen.first.shape, seen.targets.shape) == ((197, 344), (2, 147, 344))
    assert seen.pairs == 491 * 197  # each of the 491 rows sees 197 keys
    # Two programs with the 197 first rows: 3 whole blocks of keys and a part of one. Three with targets [0, 64),
    # [64, 128) and [128, 147), whose rows all see the keys [64, 197), [128, 261) and [147, 325), of [0, 261), [64, 325)
    # and [128, 344): 2 of 5 blocks, 2 of 5 and 2 of 4.
    assert tile_count.two_stream_by_row(seen, 128, 64) == Tiles(
        programs=5, plain=3 + 3 + 2 + 2 + 2, masked=1 + 1 + 3 + 3 + 2, passing=197 * 2 + 261 * 2 + 216, staying=491
    )
    # Keys [0, 128), [128, 256), [256, 344). First rows: 6 whole tiles of 32 and a part for the first keys, 7 tiles at
    # the end of the window for the second, none for the third. Targets, 16 at a time: [0, 128), [0, 147), [59, 147).
    # All rows of a target tile see the second keys where 59 <= i < 128: 4 tiles from 64 on.
    assert tile_count.two_stream_by_key(seen, 32, 128) == Tiles(
        programs=3, plain=6 + 4, masked=1 + 8 + 7 + 6 + 6, passing=(197 + 256) + (197 + 294) + 176, staying=344
    )


@pytest.mark.parametrize("with_content", [True, False])
@pytest.mark.parametrize("mask_tokens", [True, False])
def test_tiles_hold_all_visible_pairs(mask_tokens: bool, with_content: bool) -> None:
    """Tiles without a mask are not more than there are visible pairs, and all tiles together not fewer."""
    seen = tile_count.two_stream(11, 4, mask_tokens=mask_tokens, with_content=with_content)
    rows_of_groups = {"A": 4, "M": 7 * mask_tokens, "B": 7} if with_content else {}
    assert seen.rows == sum(rows_of_groups.values()) + 7
    for rows, keys in ((2, 3), (4, 2), (6, 5)):
        by_key = tile_count.two_stream_by_key(seen, rows, keys)
        assert by_key.plain * rows * keys <= seen.pairs <= by_key.count * rows * keys
        by_row = tile_count.two_stream_by_row(seen, rows, keys)
        assert seen.pairs <= by_row.count * rows * keys
    single = tile_count.two_stream_by_key(tile_count.two_stream(11, 4), 2, 1)
    pairs = tile_count.two_stream(11, 4)
    # One target and one key: plain where both B and G see it. Two first rows and one key: plain where both see it.
    both = pairs.targets.all(0).sum() + sum(pairs.first[i : i + 2].all(0).sum() for i in range(0, 10, 2))
    assert single.plain == both


def test_prefix_suffix_counts_by_hand() -> None:
    # Two content keys before the cut, two after it, two suffix keys; rows of shifts 0, 1 and 2.
    seen = tile_count.prefix_suffix_rows(np.array([0, 1, 2]), 2, 4, 2)
    assert seen.astype(int).tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0]]
    # Rows 0 and 1 see the keys 0, 1, 2, 4, 5: of blocks of two, [0, 1] needs no mask. Row 2 sees 0 to 3: two such.
    assert tile_count.prefix_suffix_by_row(seen, 2, 2) == Tiles(programs=2, plain=3, masked=2, passing=9, staying=3)
    # Keys [0, 1]: rows 0 and 1 whole, row 2 is half a tile; [2, 3]: a part of both tiles; [4, 5]: of the first.
    assert tile_count.prefix_suffix_by_key(seen, 2, 2) == Tiles(programs=3, plain=1, masked=4, passing=8, staying=6)
