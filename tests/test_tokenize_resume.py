"""Tokenising that is killed goes on to the same bytes; several processes write what one does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import FIT, SIZES, pictures
from datafakes import BrightnessTokenizer, NoiseSource, entries, flip
from forked import kill_after, killed_at_sync, run_ranks

from mapet.cli import main
from mapet.distributed import connect
from mapet.errors import DataError, MapetError
from mapet.tokenizers.encode import tokenize

TOKENIZER = BrightnessTokenizer()
SHARDS = {"image_size": 8, "batch_size": 2, "shard_images": 4, "workers": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a cache of 18 images, one of them bad, made without interruption: 5 shards."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    tokenize(NoiseSource(18, bad=[5]), TOKENIZER, path, max_skipped=0.1, **SHARDS)
    return entries(path)


def make(path: Path, **changes) -> object:
    settings = {"source": NoiseSource(18, bad=[5]), "tokenizer": TOKENIZER, "max_skipped": 0.1, **SHARDS, **changes}
    return tokenize(output=path, **settings)


class Dying(BrightnessTokenizer):
    """Breaks off by an error at its n-th batch."""

    def __init__(self, at, error):
        super().__init__()
        self.left, self.error = at, error

    def encode(self, images):
        self.left -= 1
        if not self.left:
            raise self.error
        return super().encode(images)


class TestAfterAnEnd:
    def test_every_moment_of_a_kill(self, whole, tmp_path, capsys):
        """SIGKILL before every other write to disk: the shards', the records', the manifest's, the last move's."""
        kills = 0
        for sync in range(1, 100, 2):
            path = tmp_path / str(sync) / "cache"
            if not killed_at_sync(lambda path=path: make(path), sync):
                break
            kills += 1
            report = make(path)
            assert entries(path) == whole, f"after a kill at sync {sync}"
            assert [found.name for found in path.parent.iterdir()] == ["cache"]
            assert report.reused or report.time.images == 18 - min(18, 4 * report.resumed)
        assert kills > 15

    def test_finished_shards_are_not_read_again(self, whole, tmp_path, monkeypatch, capsys):
        with pytest.raises(RuntimeError):
            make(tmp_path / "cache", tokenizer=Dying(6, RuntimeError()))
        capsys.readouterr()
        source = NoiseSource(18, bad=[5])
        loaded, load = [], source.load
        monkeypatch.setattr(source, "load", lambda index: loaded.append(index) or load(index))
        report = make(tmp_path / "cache", source=source)
        assert loaded == list(range(8, 18)), "two shards of four were finished"
        assert "going on from 2 of 5 shards" in capsys.readouterr().out
        assert (report.resumed, report.shards, report.time.images, report.images) == (2, 5, 10, 17)
        assert "2 of 5 shards were finished by an earlier run" in report.summary()
        assert [item.name for item in report.skipped] == ["noise_5"], "the one that an earlier run found"
        assert entries(tmp_path / "cache") == whole

    def test_ctrl_c_keeps_the_finished_shards_and_says_so(self, whole, tmp_path):
        with pytest.raises(KeyboardInterrupt, match="goes on from 2 of 5 shards"):
            make(tmp_path / "cache", tokenizer=Dying(6, KeyboardInterrupt()))
        make(tmp_path / "cache")
        assert entries(tmp_path / "cache") == whole

    def test_a_damaged_shard_is_made_again(self, whole, tmp_path):
        with pytest.raises(RuntimeError):
            make(tmp_path / "cache", tokenizer=Dying(6, RuntimeError()))
        flip(tmp_path / ".cache.partial/cache/images_00001.npy")
        with pytest.warns(UserWarning, match=r"shard 1 of .*is made again: .*images_00001\.npy is not as it was"):
            report = make(tmp_path / "cache")
        assert report.resumed == 1 and entries(tmp_path / "cache") == whole

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"source": NoiseSource(17)}, "source_fingerprint is"),
            ({"tokenizer": BrightnessTokenizer(input_size=32)}, "tokenizer_fingerprint is"),
            ({"shard_images": 6}, "shard_images is 4, wanted 6"),
        ],
    )
    def test_unfinished_work_of_another_kind(self, tmp_path, change, message, capsys):
        with pytest.raises(RuntimeError):
            make(tmp_path / "cache", tokenizer=Dying(6, RuntimeError()))
        before = entries(tmp_path)
        with pytest.raises(DataError, match=rf"work of another kind .*{message}.*or delete that folder"):
            make(tmp_path / "cache", **change)
        assert entries(tmp_path) == before
        capsys.readouterr()
        report = make(tmp_path / "cache", overwrite=True, **change)
        assert report.resumed == 0 and "dropped unfinished work" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    def test_a_higher_limit_goes_on_where_the_lower_one_stopped(self, tmp_path):
        bad = NoiseSource(18, bad=[1, 9])
        with pytest.raises(DataError, match=r"2 unreadable images.*noise_1: broken; .*noise_9"):
            make(tmp_path / "cache", source=bad, max_skipped=0.06)
        report = make(tmp_path / "cache", source=bad, max_skipped=0.12)
        assert report.resumed == 2 and [item.name for item in report.skipped] == ["noise_1", "noise_9"]

    def test_left_beside_a_complete_cache(self, whole, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("mapet.data.jobs.clear", lambda folder: None)
            make(tmp_path / "cache")
        assert (tmp_path / ".cache.partial/part_00000.json").exists()
        assert make(tmp_path / "cache").reused
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def done(path: Path) -> int:
    """Finished shards of an unfinished cache."""
    return len(list(path.parent.glob(f".{path.name}.partial/part_*.json")))


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """All of `mapet tokenize` but --output and --workers; the tokenizer is saved."""
    folder = tmp_path_factory.mktemp("command")
    images = pictures(folder / "images", per_class=150)
    (images / "bars/aa_truncated.png").write_bytes((images / "bars/00.png").read_bytes()[:200])
    saving = ("tokenize", "--images", images, "--output", folder / "first", "--codebook", folder / "tokenizer")
    assert main([*map(str, (*saving, *SIZES, *FIT))]) == 0
    given = ("tokenize", "--images", images, "--codebook", folder / "tokenizer", "--batch-size", 8)
    return [*map(str, (*given, "--shard-images", 10, "--device", "cpu"))]


@pytest.fixture(scope="module")
def expected(command, tmp_path_factory) -> dict[str, bytes]:
    """The files of the cache that it makes of 300 images, 31 shards, when nothing happens."""
    path = tmp_path_factory.mktemp("expected") / "cache"
    assert main([*command, "--workers", "0", "--output", str(path)]) == 0
    return entries(path)


class TestCommand:
    """`mapet tokenize` as it is typed."""

    def test_three_kills_at_random_moments(self, command, expected, tmp_path, capfd):
        seed = random.randrange(10**6)
        rng, path = random.Random(seed), tmp_path / "cache"
        arguments = [*command, "--workers", "1", "--output", str(path)]
        finished = 0
        for _ in range(3):
            wanted = finished + rng.randrange(1, 9)
            kill_after(lambda: main(arguments), lambda wanted=wanted: done(path) >= wanted, rng)
            finished = done(path)
            assert 0 < finished < 31 and not path.exists(), f"seed {seed}"
        capfd.readouterr()
        assert main(arguments) == 0
        out = capfd.readouterr().out
        assert f"going on from {finished} of 31 shards" in out, f"seed {seed}"
        assert "skipped 1 images" in out and "aa_truncated.png" in out
        assert entries(path) == expected, f"seed {seed}"
        assert [found.name for found in tmp_path.iterdir()] == ["cache"]

    def test_torchrun_writes_what_one_process_writes(self, command, expected, tmp_path):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mapet"]
        arguments = [*launch, *command, "--workers", "0", "--output", str(tmp_path / "cache")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        assert entries(tmp_path / "cache") == expected
        assert run.stdout.count("next: mapet pretrain") == 1
        assert "process 0 of 2: " in run.stderr and "process 1 of 2: " in run.stderr
        assert "300 images" in run.stdout and "time waited for: " in run.stdout

    def test_ranks_fit_once_and_use_the_same_tokenizer(self, command, tmp_path, capfd):
        images = command[command.index("--images") + 1]
        fitting = ["tokenize", "--images", images, "--shard-images", "40", *map(str, (*SIZES, *FIT))]
        assert main([*fitting, "--output", str(tmp_path / "one")]) == 0
        assert run_ranks(lambda rank: main([*fitting, "--output", str(tmp_path / "two")])) == [0, 0]
        assert entries(tmp_path / "two") == entries(tmp_path / "one")


class TestRanks:
    def test_a_rank_that_dies_leaves_its_finished_shards(self, whole, tmp_path):
        path = tmp_path / "cache"

        def run(rank: int) -> None:
            with connect("cpu") as world:
                deadly = Dying(4, RuntimeError()) if rank else TOKENIZER
                try:
                    make(path, tokenizer=deadly, world=world)
                except RuntimeError:
                    os.kill(os.getpid(), signal.SIGKILL)

        codes = run_ranks(run, timeout=15)
        assert codes[1] == -signal.SIGKILL and codes[0] != 0
        found = sorted(part.name for part in tmp_path.glob(".cache.partial/part_*.json"))
        assert found == [f"part_0000{number}.json" for number in (0, 1, 2, 4)], "rank 1 died in shard 3"
        report = make(path)
        assert report.resumed == 4 and entries(path) == whole

    def test_three_ranks_go_on_from_one(self, whole, tmp_path):
        path = tmp_path / "cache"
        with pytest.raises(RuntimeError):
            make(path, tokenizer=Dying(6, RuntimeError()))

        def run(rank: int) -> int:
            with connect("cpu") as world:
                report = make(path, world=world)
                return 0 if (report.images, report.resumed, report.time.images) == (17, 2, 10) else 1

        assert run_ranks(run, 3) == [0, 0, 0], "and all of them have the report"
        assert entries(path) == whole

    def test_unreadable_images_count_over_all_ranks(self, tmp_path):
        """Four shards with one bad image each, of which three are allowed: neither rank finds more than two."""
        source = NoiseSource(16, bad=[0, 4, 8, 12])

        def run(rank: int) -> None:
            with connect("cpu") as world:
                try:
                    tokenize(source, TOKENIZER, tmp_path / "cache", max_skipped=3 / 16, world=world, **SHARDS)
                except MapetError as error:
                    (tmp_path / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
                    os._exit(1)

        codes = run_ranks(run, timeout=15)
        texts = [path.read_text() for path in tmp_path.glob("*.txt")]
        assert codes != [0, 0] and not (tmp_path / "cache").exists()
        assert any("4 unreadable images" in text and "allows 3" in text for text in texts)

    def test_ranks_with_other_images_are_refused(self, tmp_path):
        def run(rank: int) -> None:
            with connect("cpu") as world:
                try:
                    tokenize(NoiseSource(10 + rank), TOKENIZER, tmp_path / "cache", world=world, **SHARDS)
                except DataError as error:
                    (tmp_path / f"{rank}.txt").write_text(str(error))

        run_ranks(run)
        for rank in range(2):
            assert "has another job than process" in (tmp_path / f"{rank}.txt").read_text()
