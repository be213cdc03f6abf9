"""Caches, tokenizers, exports and reports replace nothing that is not theirs, and leave nothing half-made behind."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from command_line import FIT, PROBE, SIZES, everything_in
from datafakes import description, entries, no_space, random_rows, write_cache
from forked import in_fork, killed_at_sync, waiting
from safetensors.torch import save_file

from mapet.cli import main
from mapet.config import ModelConfig
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import CacheWriter
from mapet.errors import ConfigError, DataError, MapetError
from mapet.files import NpyWriter
from mapet.folders import Staging, locked
from mapet.model.export import export
from mapet.model.vit import MaskedTokenViT
from mapet.tokenizers import load_tokenizer, make_tokenizer
from mapet.tokenizers.kmeans import KMeansTokenizer

MODEL = ModelConfig(image_size=16, patch_size=4, width=32, depth=1, heads=2, vocabulary=16)
THESIS = "years of work"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MaskedTokenViT(MODEL).state_dict()


class TestCache:
    @pytest.mark.parametrize("name", ["notes.txt", "run"])
    def test_overwriting_takes_nothing_else_along(self, name, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        mapet.succeed(*command)
        if name == "run":
            (tmp_path / "cache/run/checkpoints").mkdir(parents=True)
            (tmp_path / "cache/run/metrics.jsonl").write_text("{}\n")
        else:
            (tmp_path / "cache/notes.txt").write_text(THESIS)
        before = entries(tmp_path)
        mapet.fail(*command, "--overwrite", code=1, names=(tmp_path / "cache", name, "left as it is"))
        assert entries(tmp_path) == before and (tmp_path / "cache" / name).exists()

    def test_what_came_while_the_new_one_was_made_stays(self, tmp_path):
        path = tmp_path / "cache"
        write_cache(path)
        with CacheWriter(path, description(), capacity=4, overwrite=True) as writer:
            with writer.shard(0) as shard:
                shard.append(*random_rows(4))
                shard.finish()
            (path / "notes.txt").write_text(THESIS)
            with pytest.raises(DataError, match=r"holds other things than a token cache: notes.txt"):
                writer.finish(list("abcd"))
        assert (path / "notes.txt").read_text() == THESIS and len(TokenCache.open(path)) == 10
        (path / "notes.txt").unlink()
        with CacheWriter(path, description(), capacity=4, overwrite=True) as writer:
            writer.finish(list("abcd"))
        assert len(TokenCache.open(path)) == 4 and everything_in(tmp_path) & {".cache.partial"} == set()

    def test_a_damaged_manifest_is_no_leave_to_delete(self, tmp_path):
        write_cache(tmp_path / "cache")
        (tmp_path / "cache/manifest.json").write_text("[]")
        before = entries(tmp_path)
        with pytest.raises(DataError, match=r"is no token cache; it is left as it is"):
            write_cache(tmp_path / "cache", overwrite=True)
        assert entries(tmp_path) == before

    def test_a_kill_at_any_moment_of_replacing_loses_neither(self, tmp_path):
        """SIGKILL before every flush: either cache is there in the end, whole, and nothing beside it."""
        kills = 0
        for sync in range(1, 40):
            path = tmp_path / str(sync) / "cache"
            write_cache(path, 4)
            old = entries(path)
            if not killed_at_sync(lambda path=path: write_cache(path, 10, overwrite=True, seed=1), sync):
                break
            kills += 1
            if path.exists() and entries(path) != old:
                assert len(TokenCache.open(path)) == 10
            write_cache(path, 10, overwrite=True, seed=1)
            assert len(TokenCache.open(path)) == 10
            assert [found.name for found in path.parent.iterdir()] == ["cache"]
        assert kills > 8

    def test_the_one_that_stepped_aside_comes_back(self, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        mapet.succeed(*command)
        before = entries(tmp_path)
        (tmp_path / "cache").rename(tmp_path / ".cache.replaced")
        assert "images, unchanged" in mapet.succeed(*command).out or entries(tmp_path) == before
        assert entries(tmp_path) == before
        shutil.copytree(tmp_path / "cache", tmp_path / ".cache.replaced")
        mapet.succeed(*command)
        assert entries(tmp_path) == before, "and one that was replaced is swept"

    def test_what_is_not_ours_is_not_swept(self, tmp_path):
        write_cache(tmp_path / "cache")
        (tmp_path / ".cache.replaced").mkdir()
        (tmp_path / ".cache.replaced/thesis.tex").write_text(THESIS)
        with pytest.raises(DataError, match=r"\.cache\.replaced is no token cache; it is left as it is"):
            write_cache(tmp_path / "cache", overwrite=True)
        assert (tmp_path / ".cache.replaced/thesis.tex").read_text() == THESIS
        assert len(TokenCache.open(tmp_path / "cache")) == 10


class TestTokenizer:
    def test_two_at_once(self, mapet, images, tmp_path, monkeypatch):
        """The second is refused while the first fits, and while it tokenises; the first is unharmed."""
        fit, encode, seen = KMeansTokenizer.fit, KMeansTokenizer.encode, []
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)

        def intrude(*options):
            if os.getpid() == process and len(seen) < 4:
                seen.append(in_fork(lambda: main([*map(str, command), *options])))

        def fit_and_intrude(*arguments, **options):
            intrude()
            intrude("--overwrite")
            return fit(*arguments, **options)

        def encode_and_intrude(*arguments):
            intrude()
            intrude("--overwrite")
            return encode(*arguments)

        process = os.getpid()
        monkeypatch.setattr(KMeansTokenizer, "fit", fit_and_intrude)
        monkeypatch.setattr(KMeansTokenizer, "encode", encode_and_intrude)
        assert mapet(*command).code == 0
        assert seen == [1, 1, 1, 1]
        cache = TokenCache.open(tmp_path / "cache")
        cache.verify()
        tokenizer = load_tokenizer(tmp_path / "cache_tokenizer")
        assert cache.manifest.description.tokenizer_fingerprint == tokenizer.fingerprint()
        assert {path.name for path in tmp_path.iterdir()} == {"cache", "cache_tokenizer"}

    def test_the_refusal_names_the_folder(self, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        process = waiting(lambda: hold(tmp_path / "cache_tokenizer", tmp_path / "ready"), tmp_path / "ready")
        try:
            mapet.fail(*command, code=1, names=("another process is at work", tmp_path / "cache_tokenizer"))
        finally:
            process.kill()
            process.join()
        mapet.succeed(*command)

    def test_several_may_use_one_tokenizer(self, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--codebook", tmp_path / "tokenizer", *SIZES, *FIT)
        mapet.succeed(*command, "--output", tmp_path / "one")
        process = waiting(lambda: hold(tmp_path / "tokenizer", tmp_path / "ready"), tmp_path / "ready")
        try:
            mapet.succeed(*command, "--output", tmp_path / "two")
        finally:
            process.kill()
            process.join()

    @pytest.mark.parametrize("name", ["codebook.safetensors", "tokenizer.json"])
    def test_files_of_others_are_not_overwritten(self, name, mapet, images, tmp_path):
        folder = tmp_path / "cache_tokenizer"
        folder.mkdir()
        if name == "tokenizer.json":
            (folder / name).write_text('{"version": "1.0", "model": {"type": "BPE"}}')
        else:
            save_file({"codebook": torch.ones(3)}, folder / name)
        before = entries(tmp_path)
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT, "--overwrite")
        outcome = mapet(*command)
        assert outcome.code in (1, 2) and "Traceback" not in outcome.err and str(folder) in outcome.err
        assert entries(tmp_path) == before
        tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=16)
        tokenizer.set_codebook(torch.rand(16, 48), "test")
        with pytest.raises(DataError, match="of something else, which is left as it is"):
            tokenizer.save(folder)
        assert entries(tmp_path) == before

    def test_what_others_put_where_a_fit_is_stays(self, mapet, images, tmp_path):
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        thesis = tmp_path / "cache_tokenizer/fit/thesis.tex"
        thesis.parent.mkdir(parents=True)
        thesis.write_text(THESIS)
        mapet.fail(*command, code=1, names=(thesis.parent, "holds no work of mapet", "thesis.tex"))
        assert everything_in(tmp_path / "cache_tokenizer") == {"fit", "fit/thesis.tex"}
        thesis.rename(tmp_path / "thesis.tex")
        mapet.succeed(*command)
        thesis.parent.mkdir()
        (tmp_path / "thesis.tex").rename(thesis)
        mapet.succeed(*command)
        assert [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"] and thesis.read_text() == THESIS

    def test_a_full_disk_leaves_no_half_of_a_sample(self, mapet, images, tmp_path, monkeypatch):
        monkeypatch.setattr(NpyWriter, "append", no_space)
        command = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
        mapet.fail(*command, code=1, names=("the disk is full", tmp_path / "cache_tokenizer/fit"))
        assert not everything_in(tmp_path)

    @pytest.mark.parametrize("where", ["cache_tokenizer", "cache"])
    def test_a_folder_that_cannot_be_written_is_told_before_the_fit(self, where, mapet, images, tmp_path, monkeypatch):
        monkeypatch.setattr(KMeansTokenizer, "fit", lambda *arguments, **options: pytest.fail("fitted"))
        (tmp_path / "file").write_text("")
        output = tmp_path / "out/cache"
        if where == "cache":
            output = tmp_path / "file/cache"
            given = ("--codebook", tmp_path / "tokenizer")
        else:
            given = ("--codebook", tmp_path / "file/tokenizer")
        command = ("tokenize", "--images", images, "--output", output, *SIZES, *FIT, *given)
        mapet.fail(*command, code=1, names=(tmp_path / "file", "cannot write"))


def hold(folder: Path, ready: Path) -> None:
    with locked(folder, "tokenizer"):
        ready.write_text("")
        time.sleep(600)


class TestExport:
    def test_a_model_of_others_is_not_replaced(self, weights, tmp_path):
        folder = tmp_path / "theirs"
        folder.mkdir()
        (folder / "config.json").write_text('{"architecture": "vit_base_patch16_224", "num_classes": 5}')
        save_file({"head.weight": torch.ones(5)}, folder / "model.safetensors")
        before = entries(tmp_path)
        with pytest.raises(ConfigError, match=r"theirs is no exported model.*config.json does not say"):
            export(MODEL, weights, folder)
        export(MODEL, weights, tmp_path / "ours")
        shutil.copy(tmp_path / "ours/config.json", folder / "config.json")
        with pytest.raises(ConfigError, match=r"model.safetensors does not say"):
            export(MODEL, weights, folder)
        shutil.rmtree(tmp_path / "ours")
        assert entries(tmp_path)["theirs/model.safetensors"] == before["theirs/model.safetensors"]

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_folder_with_the_name_of_a_file_is_not_deleted(self, name, weights, tmp_path):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "thesis.tex").write_text(THESIS)
        with pytest.raises(ConfigError, match=r"model is no exported model"):
            export(MODEL, weights, tmp_path / "model")
        assert (tmp_path / "model" / name / "thesis.tex").read_text() == THESIS

    def test_a_link_stays_and_nothing_is_left_beside_it(self, weights, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk/model").mkdir()
        (tmp_path / "link").symlink_to("disk/model")
        for _ in range(2):
            export(MODEL, weights, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/model/config.json").exists()
        assert {path.name for path in tmp_path.rglob("*")} == {
            "disk",
            "model",
            "link",
            "config.json",
            "model.safetensors",
        }

    def test_what_a_killed_one_left_is_swept(self, weights, tmp_path):
        export(MODEL, weights, tmp_path / "e")
        kills = 0
        for sync in range(1, 20):
            if not killed_at_sync(lambda: export(MODEL, weights, tmp_path / "e"), sync):
                break
            kills += 1
            export(MODEL, weights, tmp_path / "e")
            assert {path.name for path in tmp_path.iterdir()} == {"e"}
            assert {path.name for path in (tmp_path / "e").iterdir()} == {"config.json", "model.safetensors"}
        assert kills >= 3

    def test_the_one_that_stepped_aside_comes_back_before_anything_else(self, weights, tmp_path, monkeypatch):
        export(MODEL, weights, tmp_path / "e")
        before = entries(tmp_path / "e")
        (tmp_path / "e").rename(tmp_path / ".e.replaced")
        monkeypatch.setattr("mapet.model.export.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(MapetError, match="full"):
            export(MODEL, weights, tmp_path / "e")
        assert entries(tmp_path / "e") == before and [path.name for path in tmp_path.iterdir()] == ["e"]

    def test_two_at_once(self, weights, tmp_path):
        with Staging(tmp_path / "e", "exported model", lambda folder: ()).making():
            kind, text, code = in_fork(lambda: export(MODEL, weights, tmp_path / "e"))
        assert (kind, code) == ("BusyFolder", 1) and f"exported model in {tmp_path / 'e'}" in text
        assert not everything_in(tmp_path)


class TestReports:
    @pytest.mark.parametrize("name", ["report.md", "usage.png", "classes.csv", "photo.jpg"])
    def test_a_report_of_the_user_stays(self, name, mapet, tmp_path):
        write_cache(tmp_path / "cache")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / name).write_text(THESIS)
        given = ("codebook", "--cache", tmp_path / "cache", "--output", tmp_path / "mine")
        mapet.fail(*given, code=1, names=(tmp_path / "mine" / name, "was not written by mapet codebook"))
        assert everything_in(tmp_path / "mine") == {name} and (tmp_path / "mine" / name).read_text() == THESIS

    def test_ours_is_replaced_also_where_it_was_not_done(self, mapet, tmp_path, monkeypatch):
        write_cache(tmp_path / "cache")
        given = ("codebook", "--cache", tmp_path / "cache", "--output", tmp_path / "r")
        with monkeypatch.context() as patch:
            patch.setattr("mapet.report.codebook._usage_csv", lambda found: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                mapet(*given)
        assert (tmp_path / "r/usage.png").exists()
        for _ in range(2):
            mapet.succeed(*given)
        assert "Codebook of cache" in (tmp_path / "r/report.md").read_text()
        assert not [name for name in everything_in(tmp_path / "r") if name.startswith(".")]

    def test_scores_of_the_user_stay(self, mapet, run, images, tmp_path):
        (tmp_path / "scores.json").write_text('{"me": 1, "you": 0}')
        given = ("probe", "--checkpoint", run, "--images", images, "--output", tmp_path, *PROBE)
        mapet.fail(*given, code=1, names=(tmp_path / "scores.json", "was not written by mapet probe"))
        assert everything_in(tmp_path) == {"scores.json"}

    def test_a_probe_is_alone_and_sweeps(self, mapet, run, images, tmp_path):
        (tmp_path / "features").mkdir()
        (tmp_path / "features/.features_0123456789abcdef.npy.partial").write_text("half")
        given = ("probe", "--checkpoint", run, "--images", images, "--output", tmp_path, *PROBE, "--methods", "knn")
        with locked(tmp_path, "probe"):
            mapet.fail(*given, code=1, names=(tmp_path, "another process is at work"))
        mapet.succeed(*given)
        mapet.succeed(*given)
        assert not [name for name in everything_in(tmp_path) if "/." in name or name.startswith(".")]

    def test_two_demos(self, mapet, tmp_path):
        with locked(tmp_path, "demo"):
            mapet.fail("demo", "--quick", "--output", tmp_path, code=1, names=(tmp_path, "another process is at work"))
        assert not everything_in(tmp_path)
