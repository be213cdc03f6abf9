"""Which images a step sees: a pure function, whatever the workers, processes and resumes."""

import numpy as np
import pytest
import torch
from datafakes import write_cache

from mapet.data.loader import make_loader, step_ids, steps_per_epoch
from mapet.errors import ConfigError


def ids_of(cache, start, stop, *, workers=0, rank=0, world_size=1, global_batch=4):
    loader = make_loader(
        cache,
        seed=7,
        global_batch=global_batch,
        start_step=start,
        stop_step=stop,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )
    return [batch["ids"] for batch in loader]


pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than this machine has cores


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("loader") / "cache", 22)


class TestStepIds:
    def test_an_epoch_sees_every_image_once_and_epochs_differ(self):
        epochs = [
            torch.cat([step_ids(12, seed=3, step=epoch * 3 + i, global_batch=4) for i in range(3)]) for epoch in (0, 1)
        ]
        for ids in epochs:
            assert ids.dtype == torch.int64 and sorted(ids.tolist()) == list(range(12))
        assert not torch.equal(*epochs)
        assert not torch.equal(
            step_ids(12, seed=4, step=0, global_batch=12), step_ids(12, seed=3, step=0, global_batch=12)
        )

    def test_the_incomplete_last_batch_is_dropped(self):
        assert steps_per_epoch(11, 4) == 2
        whole = step_ids(11, seed=0, step=0, global_batch=11)
        assert torch.equal(torch.cat([step_ids(11, seed=0, step=i, global_batch=4) for i in (0, 1)]), whole[:8])
        following = step_ids(11, seed=0, step=1, global_batch=11)
        assert torch.equal(step_ids(11, seed=0, step=2, global_batch=4), following[:4])

    def test_is_pure(self):
        torch.manual_seed(1)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        first = step_ids(100, seed=5, step=17, global_batch=8)
        kept = first.clone()
        first.zero_()  # the caller's own copy
        step_ids(100, seed=6, step=0, global_batch=8)
        assert torch.equal(step_ids(100, seed=5, step=17, global_batch=8), kept)
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numpy_before)

    def test_the_order_is_fixed_for_good(self):
        # Recorded once: a run resumed with newer libraries must see the same images.
        assert step_ids(10, seed=0, step=0, global_batch=10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]

    def test_positions_are_uniform(self):
        first = torch.stack([step_ids(5, seed=seed, step=0, global_batch=5) for seed in range(2000)])
        for position in range(5):
            assert (torch.bincount(first[:, position], minlength=5) - 400).abs().max() < 90  # five standard deviations

    @pytest.mark.parametrize(("length", "batch"), [(3, 4), (0, 1), (5, 0)])
    def test_batch_that_does_not_fit(self, length, batch):
        with pytest.raises(ConfigError, match=f"global batch {batch}.*{length}"):
            step_ids(length, seed=0, step=0, global_batch=batch)

    def test_negative_seed(self):
        with pytest.raises(ConfigError, match="must not be negative"):
            step_ids(4, seed=-1, step=0, global_batch=2)


class TestLoader:
    @pytest.mark.parametrize("workers", [0, 2, 4])
    def test_resumed_ids_0_missing_0_twice_same_order(self, made, workers):
        cache, _, _ = made
        expected = [step_ids(22, seed=7, step=step, global_batch=4) for step in range(13)]
        for resume_at in (3, 5, 7):  # in mid-epoch, at an epoch's end (5 steps each), after it
            found = ids_of(cache, 0, resume_at, workers=workers) + ids_of(cache, resume_at, 13, workers=workers)
            assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
        for epoch in (0, 1):
            seen = torch.cat(expected[epoch * 5 : epoch * 5 + 5]).tolist()
            assert len(seen) == len(set(seen)) == 20

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_hold_the_images_and_tokens_of_their_ids(self, made, workers):
        cache, images, tokens = made
        loader = make_loader(cache, seed=1, global_batch=6, start_step=2, stop_step=6, workers=workers)
        batches = list(loader)
        assert len(batches) == len(loader) == 4
        for batch in batches:
            ids = batch["ids"]
            assert batch["images"].dtype == torch.uint8 and batch["tokens"].dtype == ids.dtype == torch.int64
            assert torch.equal(batch["images"], images[ids]) and torch.equal(batch["tokens"], tokens[ids])

    def test_ranks_take_contiguous_shares_of_the_same_global_batch(self, made):
        cache, _, _ = made
        whole = ids_of(cache, 0, 6)
        shares = [ids_of(cache, 0, 6, rank=rank, world_size=2) for rank in range(2)]
        assert all(torch.equal(torch.cat(parts), ids) for ids, *parts in zip(whole, *shares, strict=True))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_global_random_state_is_left_alone(self, made, workers):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        ids_of(made[0], 0, 3, workers=workers)
        assert torch.equal(torch.get_rng_state(), before)

    def test_nothing_left_to_do(self, made):
        assert ids_of(made[0], 5, 5) == [] and ids_of(made[0], 6, 5) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"global_batch": 5, "world_size": 2}, "5 is not divisible by the 2 processes"),
            ({"global_batch": 23}, "global batch 23.*22"),
            ({"rank": 2, "world_size": 2}, "rank"),
        ],
    )
    def test_bad_options(self, made, options, message):
        with pytest.raises(ConfigError, match=message):
            ids_of(made[0], 0, 1, **options)
