"""The sample for a fit from files: which vectors are kept, that nothing else changes them, what is in the folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import FIT, SIZES, pictures
from datafakes import NoiseSource, entries
from forked import killed_at_sync, run_ranks

from mapet.cli import main
from mapet.data.cache import TokenCache
from mapet.data.jobs import in_batches
from mapet.distributed import connect
from mapet.errors import ConfigError, DataError
from mapet.tokenizers import load_tokenizer, make_tokenizer
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.fitting import sample as features_module
from mapet.tokenizers.fitting.sample import GROUP, MAX_PATCHES, FeatureFiles, SamplePlan, sample_features

IMAGENET = 1_281_167
SAMPLE = {"max_patches": 400, "seed": 3, "workers": 0, "max_skipped": 0.1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """16 vectors of 48 numbers an image; without a codebook."""
    return make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)


@pytest.fixture
def short_shards(monkeypatch):
    monkeypatch.setattr(features_module, "GROUPS_OF_A_SHARD", 1)


def load(found: FeatureFiles) -> torch.Tensor:
    return found.open().read(0, found.rows)


def sample(tokenizer: Tokenizer, folder: Path, **changes: object) -> FeatureFiles:
    return sample_features(
        tokenizer=tokenizer, folder=folder, **{"source": NoiseSource(100, bad=[7]), **SAMPLE, **changes}
    )


class TestPlan:
    def test_the_rates_of_the_paper(self):
        assert SamplePlan(IMAGENET, IMAGENET, 196, MAX_PATCHES, 0).rate == 0.020
        assert SamplePlan(IMAGENET, IMAGENET, 196, 8192 * 512, 0).rate == 0.017
        plan = SamplePlan(4000, 4000, 196, 15680, 0)
        assert plan.rate == 0.02 and len(plan.kept(0, GROUP)) == 156, "a full group of 40 keeps 156"
        assert SamplePlan(100, 100, 16, 10**9, 0).rate == 1

    def test_images_in_random_order_each_once(self):
        order = SamplePlan(100, 100, 16, 400, 3).order
        assert sorted(order) == list(range(100)) != order
        assert SamplePlan(100, 100, 16, 400, 4).order != order
        assert SamplePlan(100, 30, 16, 400, 3).order == order[:30]

    def test_vectors_of_a_group_are_drawn_evenly(self):
        plan = SamplePlan(40_000, 40_000, 16, 64_000, 0)
        counts = Counter()
        for group in range(500):
            kept = plan.kept(group, 40).tolist()
            assert len(set(kept)) == 64 and kept == sorted(kept) and kept[-1] < 640
            counts.update(index // 64 for index in kept)
        # Each tenth of a group: 500 groups of hypergeometric(640, 64, 64), standard deviation 51.
        assert max(abs(counts[tenth] - 3200) for tenth in range(10)) < 4.5 * 51

    def test_a_rate_that_rounds_to_nothing(self):
        with pytest.raises(ConfigError, match=r"10 patches of 40000 images are less than 0\.05 % of their 640000"):
            SamplePlan(40_000, 40_000, 16, 10, 0)


def test_the_sample_is_the_vectors_of_the_plan(tokenizer, tmp_path):
    """Three groups of 40, 40 and 20 images, one of them unreadable; a quarter of the vectors of each."""
    found = sample(tokenizer, tmp_path / "f")
    plan = SamplePlan(100, 100, 16, 400, 3)
    assert plan.rate == 0.25
    source, expected = NoiseSource(100), []
    for number, group in enumerate(in_batches(plan.order, GROUP)):
        images = torch.stack([tokenizer.prepare(source.load(position)) for position in group if position != 7])
        expected.append(tokenizer.features(images).flatten(0, 1)[plan.kept(number, len(images))].half())
        assert len(expected[-1]) == int(16 * len(images) * 0.25)
    assert torch.equal(load(found), torch.cat(expected))
    assert (found.images, found.patches, [item.name for item in found.skipped]) == (99, 99 * 16, ["noise_7"])
    assert f"{found.rows} of 1584 patches of 99 images" in found.summary()
    assert list(found.time.waited) == ["decode", "network", "write"]


def test_the_folder_explains_itself(tokenizer, tmp_path, short_shards):
    found = sample(tokenizer, tmp_path / "f")
    values = json.loads((tmp_path / "f/features.json").read_text())
    assert [item["name"] for item in values["shards"]] == [f"features_0000{number}.npy" for number in range(3)]
    arrays = [np.load(tmp_path / "f" / item["name"], mmap_mode="r") for item in values["shards"]]
    assert [array.shape for array in arrays] == [(item["rows"], 48) for item in values["shards"]]
    assert {str(array.dtype) for array in arrays} == {values["dtype"]} == {"float16"}
    assert sum(map(len, arrays)) == values["rows"] == found.rows
    wanted = {"tokenizer": "pixel", "rate": 0.25, "seed": 3, "group": 40, "patches": 16, "readable_images": 99}
    assert wanted.items() <= values.items() and values["skipped"][0]["name"] == "noise_7"
    assert not list((tmp_path / "f").glob(".*"))


@pytest.mark.parametrize("changes", [{"workers": 2}, {"batch_size": 7}, {"batch_size": 1}], ids=str)
def test_neither_workers_nor_batches_change_the_sample(tokenizer, tmp_path, changes):
    sample(tokenizer, tmp_path / "a")
    sample(tokenizer, tmp_path / "b", **changes)
    assert entries(tmp_path / "a") == entries(tmp_path / "b")


def test_the_seed_changes_it(tokenizer, tmp_path):
    first, second = sample(tokenizer, tmp_path / "a"), sample(tokenizer, tmp_path / "b", seed=4)
    assert not torch.equal(load(first), load(second))


def test_every_moment_of_a_kill(tokenizer, tmp_path, short_shards):
    sample(tokenizer, tmp_path / "whole")
    whole = entries(tmp_path / "whole")
    kills = 0
    for sync in range(1, 50):
        folder = tmp_path / str(sync)
        if not killed_at_sync(lambda folder=folder: sample(tokenizer, folder), sync):
            break
        kills += 1
        sample(tokenizer, folder)
        assert entries(folder) == whole, f"after a kill at sync {sync}"
    assert kills > 10


def test_a_complete_sample_is_not_made_again(tokenizer, tmp_path, short_shards, monkeypatch):
    first = sample(tokenizer, tmp_path / "f")
    source = NoiseSource(100, bad=[7])
    monkeypatch.setattr(source, "load", lambda index: pytest.fail("an image was read"))
    again = sample(tokenizer, tmp_path / "f", source=source)
    assert torch.equal(load(again), load(first)) and again.time.images == 0
    (tmp_path / "f/features_00001.npy").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"shard 1 of .*is made again: features_00001\.npy is not as it was written"):
        repaired = sample(tokenizer, tmp_path / "f")
    assert torch.equal(load(repaired), load(first)) and repaired.time.images == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed is 3, wanted 4"),
        ({"max_patches": 800}, "max_patches is 400"),
        ({"limit": 50}, "images is 100"),
    ],
)
def test_another_sample_in_the_folder_is_refused(tokenizer, tmp_path, change, message):
    sample(tokenizer, tmp_path / "f")
    before = entries(tmp_path)
    with pytest.raises(DataError, match=rf"work of another kind .*{message}.*delete that folder"):
        sample(tokenizer, tmp_path / "f", **change)
    assert entries(tmp_path) == before


def test_two_ranks_write_what_one_does(tokenizer, tmp_path, short_shards):
    one = sample(tokenizer, tmp_path / "one")

    def run(rank: int) -> int:
        with connect("cpu") as world:
            found = sample(tokenizer, tmp_path / "two", world=world)
        return 0 if torch.equal(load(found), load(one)) else 1

    assert run_ranks(run) == [0, 0]
    assert entries(tmp_path / "two") == entries(tmp_path / "one")


def test_too_many_bad_images(tokenizer, tmp_path):
    with pytest.raises(DataError, match="2 unreadable images"):
        sample(tokenizer, tmp_path / "f", source=NoiseSource(100, bad=[1, 2]), max_skipped=0.01)


def test_features_that_overflow(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "features", lambda images: torch.full((len(images), 16, 48), 1e6))
    with pytest.raises(DataError, match="not finite in float16"):
        sample(tokenizer, tmp_path / "f")


class TestCommand:
    @pytest.fixture(scope="class")
    @classmethod
    def images(cls, tmp_path_factory) -> Path:
        return pictures(tmp_path_factory.mktemp("images"))

    def test_features_in_a_folder_of_their_own_stay(self, images, tmp_path, capsys):
        """40 images, so that all is kept; the codebook is that of a fit whose features go."""
        given = ["tokenize", "--images", images, *SIZES, *FIT]
        assert main([*map(str, (*given, "--output", tmp_path / "a"))]) == 0
        features = ("--features-dir", tmp_path / "features")
        assert main([*map(str, (*given, "--output", tmp_path / "b", *features))]) == 0
        assert f"{tmp_path}/features: 640 of 640 patches of 40 images" in capsys.readouterr().out
        assert entries(tmp_path / "a_tokenizer") == entries(tmp_path / "b_tokenizer")
        report = load_tokenizer(tmp_path / "b_tokenizer").report
        assert (report.images, report.patches, report.rows) == (40, 640, 640)
        assert len(list((tmp_path / "features").glob("features_*.npy"))) == 1
        made = TokenCache.open(tmp_path / "b").manifest.description
        assert made.tokenizer_fingerprint == load_tokenizer(tmp_path / "b_tokenizer").fingerprint()

    def test_ranks_share_the_sampling(self, images, tmp_path, monkeypatch, capfd):
        monkeypatch.setattr(features_module, "GROUP", 10)
        monkeypatch.setattr(features_module, "GROUPS_OF_A_SHARD", 1)
        given = ["tokenize", "--images", images, "--shard-images", 10, *SIZES, *FIT]
        one = [*map(str, (*given, "--output", tmp_path / "one", "--features-dir", tmp_path / "f1"))]
        two = [*map(str, (*given, "--output", tmp_path / "two", "--features-dir", tmp_path / "f2"))]
        assert main(one) == 0
        assert run_ranks(lambda rank: main(two)) == [0, 0]
        assert len(list((tmp_path / "f2").glob("features_*.npy"))) == 4
        assert entries(tmp_path / "f1") == entries(tmp_path / "f2")
        assert entries(tmp_path / "one") == entries(tmp_path / "two")
