"""Stateless step generators, and global random states that survive a checkpoint."""

import io
import random

import numpy as np
import pytest
import torch

from mapet.rng import (
    deterministic_algorithms,
    global_rng_state,
    seed_global_generators,
    set_global_rng_state,
    step_generator,
    step_seed,
)


def test_a_step_draws_the_same_whatever_was_drawn_before():
    first = torch.rand(4, generator=step_generator(3, 17, "plan"))
    torch.rand(100)
    assert torch.equal(first, torch.rand(4, generator=step_generator(3, 17, "plan")))


@pytest.mark.parametrize("other", [(4, 17, "plan"), (3, 18, "plan"), (3, 17, "color_jitter"), (31, 7, "plan")])
def test_seed_step_and_purpose_each_change_the_draw(other):
    assert step_seed(3, 17, "plan") != step_seed(*other)
    assert 0 <= step_seed(*other) < 2**63


def test_global_states_come_back_through_a_weights_only_file():
    seed_global_generators(5)
    random.gauss(0, 1), np.random.standard_normal(), torch.rand(3)
    file = io.BytesIO()
    torch.save(global_rng_state(torch.device("cpu")), file)

    def draw():
        return [random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.rand(3).tolist()]

    expected = draw()
    seed_global_generators(6)
    file.seek(0)
    set_global_rng_state(torch.load(file, weights_only=True), torch.device("cpu"))
    assert draw() == expected


def test_deterministic_algorithms_end_with_the_block():
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
