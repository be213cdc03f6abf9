"""The token cache: what goes in comes out, and whatever is damaged, stale or foreign is refused by name."""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datafakes import Trap, description, entries, flip, no_space, random_rows, without_root, write_cache

from mapet import files
from mapet.config import ModelConfig
from mapet.data import cache_writer
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter, shard_size
from mapet.data.manifest import Skipped
from mapet.errors import DataError

needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@pytest.fixture
def made(tmp_path):
    return write_cache(tmp_path / "cache")


class TestRoundTrip:
    def test_rows_come_back_from_all_shards_in_any_order(self, made):
        cache, images, tokens = made
        assert cache.manifest.shards == [4, 4, 2] and len(cache) == 10
        for ids in ([9, 0, 4, 4, 3, 8], torch.arange(10), np.array([5]), [6, 5], []):
            where = torch.as_tensor(ids, dtype=torch.int64)
            found = cache.images(ids)
            assert found.dtype == torch.uint8 and torch.equal(found, images[where])
            assert cache.tokens(ids).dtype == torch.int64 and torch.equal(cache.tokens(ids), tokens[where])

    def test_names_labels_and_numbers(self, made, tmp_path):
        cache, _, _ = made
        assert (cache.image_size, cache.grid, cache.vocabulary, cache.tokenizer) == (8, 2, 32, "brightness")
        assert cache.names[3] == "im/3.png" and cache.classes == ["even", "odd"]
        assert cache.labels.tolist() == [0, 1] * 5 and cache.labels.dtype == np.int64
        unlabelled, _, _ = write_cache(tmp_path / "unlabelled", labelled=False)
        assert unlabelled.labels is None and unlabelled.classes is None

    def test_tokens_up_to_65535_survive(self, tmp_path):
        images, _ = random_rows(2)
        tokens = torch.tensor([[0, 32767, 32768, 65535], [8191, 8192, 1, 2]])
        cache_writer.write_cache(tmp_path / "cache", description(vocabulary=65536), images, tokens, ["a", "b"])
        assert torch.equal(TokenCache.open(tmp_path / "cache").tokens([0, 1]), tokens)

    def test_files_are_plain_npy(self, made):
        cache, images, tokens = made
        shards = [np.load(cache.path / f"images_{i:05d}.npy", allow_pickle=False) for i in range(3)]
        assert np.array_equal(np.concatenate(shards), images.numpy())
        stored = np.load(cache.path / "tokens.npy", allow_pickle=False)
        assert stored.dtype == np.uint16 and np.array_equal(stored, tokens.numpy())

    def test_shards_stay_few_for_many_images(self):
        assert shard_size(1_281_167, 224) == 5005 and -(-1_281_167 // 5005) == 256
        assert shard_size(100_000, 224) == shard_size(10, 8) == 1024
        assert shard_size(100_000, 448) == 445, "256 MB"
        assert shard_size(100, 224, wanted=4) == 4 and shard_size(100_000, 224, wanted=4) == 391

    def test_a_shard_may_be_empty(self, tmp_path):
        images, tokens = random_rows(4)
        for empty in range(3):
            path = tmp_path / str(empty)
            with CacheWriter(path, description(), capacity=6, shard_images=2) as writer:
                for number in range(3):
                    with writer.shard(number) as shard:
                        rows = [] if number == empty else writer.positions(number - (number > empty))
                        shard.append(images[rows], tokens[rows])
                        lost = [] if rows else writer.positions(number)
                        shard.finish({position: Skipped(str(position), "lost") for position in lost})
                writer.finish(list("abcd"))
            cache = TokenCache.open(path)
            assert torch.equal(cache.images(range(4)), images) and torch.equal(cache.tokens(range(4)), tokens)
            assert sorted(cache.manifest.shards) == [0, 2, 2] and cache.manifest.shards[empty] == 0
            assert [item.name for item in cache.manifest.skipped] == [str(2 * empty), str(2 * empty + 1)]

    def test_a_cache_of_before_shards_had_a_journal_is_read(self, made):
        path = made[0].path / "manifest.json"
        values = json.loads(path.read_text())
        del values["provenance"]
        path.write_text(json.dumps(values))
        assert len(TokenCache.open(made[0].path)) == 10

    @pytest.mark.parametrize("ids", [[10], [-1], [0, 3, 99]])
    def test_ids_outside_are_an_index_error(self, made, ids):
        with pytest.raises(IndexError, match="holds 0 to 9"):
            made[0].images(ids)
        with pytest.raises(IndexError, match="holds 0 to 9"):
            made[0].tokens(ids)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_workers_read_the_same(self, made, method):
        cache, images, _ = made
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert torch.equal(torch.from_numpy(pool.apply(read_rows, (cache,))), images[[1, 9]])

    def test_pickle_holds_no_pixels(self, tmp_path):
        images, tokens = random_rows(200)
        cache_writer.write_cache(tmp_path / "cache", description(), images, tokens, [str(i) for i in range(200)])
        frozen = pickle.dumps(TokenCache.open(tmp_path / "cache"))
        assert len(frozen) < 2000
        assert torch.equal(pickle.loads(frozen).images([7]), images[[7]])


def read_rows(cache):
    return cache.images([1, 9]).numpy()


class TestDamage:
    @pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "names.json"])
    def test_a_flipped_bit_is_seen_when_opening(self, made, name):
        flip(made[0].path / name, at=-2)
        with pytest.raises(DataError, match=rf"{name} is damaged"):
            TokenCache.open(made[0].path)

    def test_a_flipped_pixel_is_seen_by_verify(self, made):
        made[0].verify()
        flip(made[0].path / "images_00001.npy")
        with pytest.raises(DataError, match=r"images_00001\.npy is damaged"):
            TokenCache.open(made[0].path).verify()

    @pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "names.json", "images_00002.npy"])
    def test_truncated_or_missing_files(self, made, name):
        path = made[0].path / name
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(DataError, match=rf"{name} has \d+ bytes, expected \d+"):
            TokenCache.open(made[0].path)
        path.unlink()
        with pytest.raises(DataError, match=rf"{name} .*cannot be read: No such file"):
            TokenCache.open(made[0].path)

    @pytest.mark.parametrize("name", ["tokens.npy", "images_00000.npy"])
    def test_pickles_are_refused_and_not_unpickled(self, made, tmp_path, name):
        path, trap = made[0].path / name, Trap(tmp_path / "ran")
        if name == "tokens.npy":
            np.save(path, np.array([trap], dtype=object), allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(trap))
        approve(made[0].path, name)
        with pytest.raises(DataError, match=rf"{name}.*{'Python objects' if name == 'tokens.npy' else ''}"):
            TokenCache.open(made[0].path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("array", "found"),
        [
            (np.zeros((10, 4), np.int16), "int16"),
            (np.zeros((9, 4), np.uint16), r"\(9, 4\)"),
            (np.zeros((10, 9), np.uint16), r"\(10, 9\)"),
        ],
    )
    def test_tokens_of_another_type_length_or_grid(self, made, array, found):
        np.save(made[0].path / "tokens.npy", array)
        approve(made[0].path, "tokens.npy")
        with pytest.raises(DataError, match=rf"tokens\.npy: it holds .*{found}.*expected uint16 \(10, 4\)"):
            TokenCache.open(made[0].path)

    def test_token_out_of_range(self, made):
        np.save(made[0].path / "tokens.npy", np.full((10, 4), 32, np.uint16))
        approve(made[0].path, "tokens.npy")
        with pytest.raises(DataError, match=r"tokens\.npy holds token 32, allowed are 0 to 31"):
            TokenCache.open(made[0].path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda values: values.update(format=2), "has format 2, this version of mapet reads 1"),
            (lambda values: values.update(images=11), "shards hold 10 images, its count is 11"),
            (lambda values: values.pop("files"), "its content lacks files"),
            (lambda values: values.update(extra=1), "its content has an unknown entry 'extra'"),
            (lambda values: values["description"].update(grid="2"), "grid must be a whole number, got '2'"),
            (lambda values: values["files"].update({"../evil.npy": {"bytes": 1, "sha256": ""}}), "lists files"),
        ],
    )
    def test_damaged_manifest(self, made, change, message):
        path = made[0].path / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        with pytest.raises(DataError, match=message):
            TokenCache.open(made[0].path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000])
    def test_manifest_that_is_none(self, made, text):
        (made[0].path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json"):
            TokenCache.open(made[0].path)

    def test_folder_that_is_no_cache(self, tmp_path):
        with pytest.raises(DataError, match=r"is no token cache.*mapet tokenize"):
            TokenCache.open(tmp_path)


class TestMismatch:
    def test_model(self, made):
        model = {"image_size": 8, "patch_size": 4, "vocabulary": 32}
        made[0].check_model(ModelConfig(**model))
        for change, message in (
            ({"image_size": 16, "patch_size": 8}, "image_size=8, the model has 16"),
            ({"patch_size": 2}, "patch_size=4, the model has 2"),
            ({"vocabulary": 64}, "vocabulary=32, the model has 64"),
        ):
            with pytest.raises(DataError, match=rf"is for model\.{message}"):
                made[0].check_model(ModelConfig(**{**model, **change}))


def write_shard(writer, number, images, tokens):
    with writer.shard(number) as shard:
        rows = torch.as_tensor(writer.positions(number))
        shard.append(images[rows], tokens[rows])
        shard.finish()


class TestWriter:
    def test_an_error_inside_leaves_nothing(self, tmp_path):
        for error in (RuntimeError, KeyboardInterrupt):
            with (
                pytest.raises(error),
                CacheWriter(tmp_path / "cache", description(), capacity=10) as writer,
                writer.shard(0) as shard,
            ):
                shard.append(*random_rows(5))
                raise error
            assert list(tmp_path.iterdir()) == []

    def test_an_error_inside_leaves_the_old_cache(self, made, tmp_path):
        before = entries(tmp_path)
        new = CacheWriter(made[0].path, description(), capacity=10, overwrite=True)
        with pytest.raises(RuntimeError), new as writer, writer.shard(0) as shard:
            shard.append(*random_rows(5, seed=1))
            raise RuntimeError
        assert entries(tmp_path) == before

    def test_an_error_leaves_the_finished_shards(self, tmp_path):
        images, tokens = random_rows(10)
        path = tmp_path / "cache"
        with pytest.raises(RuntimeError), CacheWriter(path, description(), capacity=10, shard_images=4) as writer:
            write_shard(writer, 1, images, tokens)
            with writer.shard(0):
                raise RuntimeError
        writer = CacheWriter(path, description(), capacity=10, shard_images=4)
        assert writer.begin() == [1] and writer.damage(1) is None and not path.exists()
        for number in (0, 2):
            write_shard(writer, number, images, tokens)
        writer.finish([str(i) for i in range(10)])
        assert torch.equal(TokenCache.open(path).images(range(10)), images)
        assert [found.name for found in tmp_path.iterdir()] == ["cache"]

    @needs_full_disk
    def test_disk_full_while_writing_pixels(self, made, tmp_path, monkeypatch):
        before = entries(tmp_path)
        with pytest.raises(DataError, match=r"disk is full.*nothing was kept"):
            monkeypatch.setattr(files, "open_new", full_disk)
            write_cache(made[0].path, 40, overwrite=True, seed=1)
        assert entries(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    @needs_full_disk
    def test_disk_full_after_some_shards(self, made, tmp_path, monkeypatch):
        before, (images, tokens) = entries(made[0].path), random_rows(10, seed=1)
        settings = {"capacity": 10, "shard_images": 4, "overwrite": True}
        full = pytest.raises(DataError, match=r"disk is full.*2 of 3 shards are kept")
        with full, CacheWriter(made[0].path, description(), **settings) as writer:
            for number in range(2):
                write_shard(writer, number, images, tokens)
            with monkeypatch.context() as patch:
                patch.setattr(files, "open_new", full_disk)
                write_shard(writer, 2, images, tokens)
        assert entries(made[0].path) == before
        with CacheWriter(made[0].path, description(), **settings) as writer:
            write_shard(writer, 2, images, tokens)
            writer.finish([str(i) for i in range(10)])
        assert torch.equal(TokenCache.open(made[0].path).images(range(10)), images)

    def test_disk_full_at_the_manifest(self, made, monkeypatch):
        before = entries(made[0].path)

        monkeypatch.setattr(cache_writer, "write_whole", no_space)
        with pytest.raises(DataError, match=r"disk is full.*3 of 3 shards are kept"):
            write_cache(made[0].path, overwrite=True, seed=1)
        assert entries(made[0].path) == before

    def test_overwrite_replaces_and_cleans_up(self, made, tmp_path):
        with pytest.raises(DataError, match="holds a token cache already"):
            write_cache(made[0].path, seed=1)
        cache, images, _ = write_cache(made[0].path, 5, overwrite=True, seed=1)
        assert len(cache) == 5 and torch.equal(cache.images([4]), images[[4]])
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]
        assert len(list(cache.path.glob("images_*"))) == 2

    def test_old_cache_comes_back_when_the_move_fails(self, made, tmp_path, monkeypatch):
        before, rename = {"cache": entries(made[0].path)}, os.rename

        def failing(old, new):
            if ".partial" in str(old):
                raise OSError(5, "Input/output error")
            rename(old, new)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(DataError, match="Input/output error"):
            write_cache(made[0].path, overwrite=True, seed=1)
        assert entries(made[0].path) == before["cache"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_other_things_is_never_replaced(self, tmp_path, overwrite):
        (tmp_path / "home").mkdir()
        (tmp_path / "home/thesis.tex").write_text("years of work")
        for path in (tmp_path / "home", tmp_path / "home/thesis.tex"):
            with pytest.raises(DataError, match="is no token cache; it is left as it is"):
                write_cache(path, overwrite=overwrite)
        assert (tmp_path / "home/thesis.tex").read_text() == "years of work"

    def test_empty_folder_and_link_are_fine(self, tmp_path):
        (tmp_path / "disk/empty").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "disk/empty")
        write_cache(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and len(TokenCache.open(tmp_path / "disk/empty")) == 10

    def test_a_folder_that_may_not_be_written(self, tmp_path):
        (tmp_path / "mine").mkdir(mode=0o500)
        with without_root(), pytest.raises(DataError, match=r"cannot write the token cache .*Permission denied"):
            write_cache(tmp_path / "mine/cache")

    def test_a_parent_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="cannot write the token cache"):
            write_cache(tmp_path / "file/cache")

    @pytest.mark.parametrize(
        ("images", "tokens", "message"),
        [
            (torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, dtype=torch.int64), "images are float32"),
            (torch.zeros(1, 3, 9, 8, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.int64), r"\(3, 9, 8\)"),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 4), "tokens are float32"),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 9, dtype=torch.int64), r"\(1, 9\)"),
            (
                torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
                torch.full((1, 4), 32),
                "tokens 32 to 32, allowed are 0 to 31",
            ),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 4), -1), "allowed are 0 to 31"),
        ],
    )
    def test_rows_that_do_not_belong(self, tmp_path, images, tokens, message):
        with pytest.raises(DataError, match=message):
            cache_writer.write_cache(tmp_path / "c", description(), images, tokens, ["a"])
        assert list(tmp_path.iterdir()) == []

    def test_nothing_at_all(self, tmp_path):
        with pytest.raises(DataError, match="no image"):
            cache_writer.write_cache(tmp_path / "c", description(), *random_rows(0), [])
        assert list(tmp_path.iterdir()) == []

    def test_shards_that_are_not_all_there(self, tmp_path):
        with CacheWriter(tmp_path / "c", description(), capacity=6, shard_images=2) as writer:
            write_shard(writer, 1, *random_rows(6))
            with pytest.raises(DataError, match="has 1 of 3 finished shards"):
                writer.finish([])
            with (
                pytest.raises(ValueError, match="shard 0 is for 2 images, got 0, and 1 skipped"),
                writer.shard(0) as shard,
            ):
                shard.finish({0: Skipped("a", "broken")})
            assert list(writer.parts()) == [1]

    def test_provenance_is_in_the_manifest_once(self, tmp_path):
        images, tokens = random_rows(6)
        for number, device in enumerate(("cpu", "gpu", "cpu")):
            settings = {"capacity": 6, "shard_images": 2, "provenance": {"device": device}}
            with CacheWriter(tmp_path / "c", description(), **settings) as writer:
                write_shard(writer, number, images, tokens)
                if number == 2:
                    writer.finish(list("abcdef"))
        assert TokenCache.open(tmp_path / "c").manifest.provenance == [{"device": "cpu"}, {"device": "gpu"}]


class TestUnfinishedWork:
    """The hidden folder of a run that ended early, found by the next one."""

    @pytest.fixture
    def left(self, tmp_path):
        """The path of a cache of 10 images, of which shard 0 is finished, in its hidden folder."""
        with CacheWriter(tmp_path / "cache", description(), capacity=10, shard_images=4) as writer:
            write_shard(writer, 0, *random_rows(10))
        return tmp_path / "cache"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tokenizer_fingerprint": "other"}, "tokenizer_fingerprint is t, wanted other"),
            ({"source_fingerprint": "other"}, "source_fingerprint is s, wanted other"),
            ({"shard_images": 5}, "shard_images is 4, wanted 5"),
            ({"capacity": 11}, "images is 10, wanted 11"),
        ],
    )
    def test_of_another_kind_is_refused_unless_overwritten(self, left, change, message, capsys):
        before = entries(left.parent)
        given = {"capacity": 10, "shard_images": 4, **change}
        named = {name: given.pop(name) for name in change if name.endswith("fingerprint")}
        with pytest.raises(
            DataError, match=rf"\.cache\.partial holds work of another kind .*{message}.*delete that folder"
        ):
            CacheWriter(left, description(**named), **given).begin()
        assert entries(left.parent) == before
        writer = CacheWriter(left, description(**named), overwrite=True, **given)
        assert writer.begin() == [] and message in capsys.readouterr().out
        assert not list(writer.folder.rglob("*.npy"))
        writer.close()

    def test_a_folder_of_other_things_is_refused(self, left):
        shutil.rmtree(left.with_name(".cache.partial"))
        left.with_name(".cache.partial").mkdir()
        left.with_name(".cache.partial").joinpath("thesis.tex").write_text("years of work")
        with pytest.raises(DataError, match="holds no work of mapet; move it away"):
            CacheWriter(left, description(), capacity=10, overwrite=True).begin()
        assert left.with_name(".cache.partial").joinpath("thesis.tex").exists()

    def test_a_second_process_is_refused(self, left):
        code = (
            "import sys; sys.path.insert(0, sys.argv[2]); from datafakes import description\n"
            "from mapet.data.cache_writer import CacheWriter\n"
            "try: CacheWriter(sys.argv[1], description(), capacity=10, shard_images=4).begin()\n"
            "except Exception as error: print(error)\n"
        )
        command = [sys.executable, "-c", code, left, Path(__file__).parent]
        with CacheWriter(left, description(), capacity=10, shard_images=4):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert f"another process is at work on the token cache in {left}" in done.stdout
        assert left.with_name(".cache.partial").is_dir()

    @pytest.mark.parametrize("name", ["cache/images_00000.npy", "tokens_00000.npy"])
    @pytest.mark.parametrize("change", ["flip", "truncate", "unlink"])
    def test_damaged_files_are_seen(self, left, name, change):
        writer = CacheWriter(left, description(), capacity=10, shard_images=4)
        assert writer.damage(0) is None
        path = writer.folder / name
        {"flip": flip, "truncate": lambda path: os.truncate(path, 100), "unlink": Path.unlink}[change](path)
        assert name in writer.damage(0)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"files": {"a": {}}, "facts": {}}'])
    def test_a_damaged_record_is_no_record(self, left, text):
        writer = CacheWriter(left, description(), capacity=10, shard_images=4)
        (writer.folder / "part_00000.json").write_text(text)
        assert writer.begin() == [] and "no record" in writer.damage(0)
        writer.close()

    def test_shards_without_a_plan_are_dropped(self, left):
        left.with_name(".cache.partial").joinpath("plan.json").write_text("{")
        with CacheWriter(left, description(), capacity=10, shard_images=4) as writer:
            assert list(writer.parts()) == []

    @pytest.mark.parametrize("change", [{"grid": 0}, {"vocabulary": 65537}, {"image_size": 8.0}])
    def test_impossible_description(self, change):
        with pytest.raises(DataError, match=next(iter(change))):
            description(**change)


def full_disk(path):
    """A file on which every write fails with the system's own "no space left"."""
    return Path("/dev/full").open("wb")


def test_the_bomb_of_these_tests_is_live(tmp_path):
    code = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(Trap(tmp_path / "ran")), check=True)
    assert (tmp_path / "ran").exists()


def approve(folder, name):
    """Enter a file's present size and hash into the manifest, as an attacker would."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    record = files.FileRecord.of(folder / name)
    values["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}
    path.write_text(json.dumps(values))
