"""bench/tile_count.py: tiles and masks, against hand counts, the visible pairs, and the kernels themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import tile_count
from bench.tile_count import Tiles
from mapet_kernels.two_stream_attention.tiles import Shape
from mapet_kernels.visibility import two_stream_visibility

FOLDER = Path(__file__).parent


def test_counts_are_those_of_the_kernels() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "triton_tile_cases.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_hand_counts_at_the_target() -> None:
    # Rows 0 to 196 have the shift 0; then two rows have each shift but the last. Tiles of 128 rows see the keys
    # [0, 197), [0, 226), [30, 290), [94, 344): 4, 4, 5 and 4 tiles of 64. A mask for keys before the window of a row
    # where a tile begins before the largest shift (0, 29, 93, 147), one for keys after where it ends beyond
    # 197 + the least (0, 0, 30, 94): the last of the first program, and so on.
    assert tile_count.by_row(Shape(197, 50), 128, 64) == Tiles(
        programs=4,
        tiles=4 + 4 + 5 + 4,
        masks=(0 + 1 + 1 + 1, 1 + 1 + 2 + 1),
        passing=197 + 226 + 260 + 250,
        staying=491,
    )


def in_order(shape: Shape) -> np.ndarray:
    """Who sees whom, from visibility.py: bool (rows, keys), rows A, M, G_0, B_0, G_1 and so on, keys M, A, B."""
    tokens, cut = shape.tokens, shape.cut
    content, query = (x.numpy() for x in two_stream_visibility(tokens, cut, mask_tokens=shape.mask_tokens))
    content, query = (np.concatenate([x[:, tokens:], x[:, :tokens]], 1) for x in (content, query))
    if not shape.with_content:
        return query
    targets = np.stack([query, content[cut:tokens]], 1).reshape(-1, query.shape[1])
    return np.concatenate([content[:cut], content[tokens:], targets])


@pytest.mark.parametrize("with_content", [True, False])
@pytest.mark.parametrize("mask_tokens", [True, False])
@pytest.mark.parametrize(("tokens", "cut"), [(11, 4), (7, 0), (5, 4)])
def test_tiles_hold_every_visible_pair_and_masks_every_invisible_one(
    tokens: int, cut: int, mask_tokens: bool, with_content: bool
) -> None:
    shape = Shape(tokens, cut, with_content, mask_tokens)
    seen = in_order(shape)
    assert seen.shape == (shape.rows, shape.keys)
    for rows, keys in ((4, 3), (2, 8), (8, 2)):
        met = np.zeros_like(seen)
        for x in range(0, shape.rows, rows):
            lo, full_lo, full_hi, hi = shape.keys_of_rows(x, x + rows)
            for p in range(lo, hi, keys):
                met[x : x + rows, p : p + keys] = True
                if p >= full_lo and p + keys <= full_hi:  # no mask
                    assert seen[x : x + rows, p : p + keys].all()
        assert (met | ~seen).all()
        met[:] = False
        for p in range(0, shape.keys, keys):
            lo, full_lo, full_hi, hi = shape.rows_of_keys(p, p + keys)
            for x in range(lo // 4 * 4, hi, rows):
                met[x : x + rows, p : p + keys] = True
                if x >= full_lo and x + rows <= full_hi:
                    assert seen[x : x + rows, p : p + keys].all()
        assert (met | ~seen).all()
