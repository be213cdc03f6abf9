"""Folders that commands write: one process at a time, and no output where another is."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import FIT, SIZES, TRAINING, everything_in, training
from forked import FORK, in_fork, waiting

from mapet.cli import main
from mapet.config import ModelConfig
from mapet.errors import ConfigError, DataError
from mapet.folders import LOCK, BusyFolder, FolderLock, check_apart, check_place, claim, locked
from mapet.model.export import export
from mapet.model.vit import MaskedTokenViT

MODEL = ModelConfig(image_size=16, patch_size=4, width=32, depth=1, heads=2, vocabulary=16)
THESIS = "years of work"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MaskedTokenViT(MODEL).state_dict()


class TestLock:
    def test_the_second_process_is_refused_and_the_folder_named(self, tmp_path):
        with locked(tmp_path / "here", "run"):
            kind, text, code = in_fork(lambda: FolderLock(tmp_path / "here", "run"))
        assert (kind, code) == ("BusyFolder", 1) and f"at work on the run in {tmp_path / 'here'}" in text
        assert not everything_in(tmp_path), "nor is anything left"

    def test_a_killed_holder_s_lock_is_taken_over_while_its_workers_live(self, tmp_path):
        pids = tmp_path / "pids"

        def hold() -> None:
            lock = FolderLock(tmp_path / "there", "run")
            worker = FORK.Process(target=time.sleep, args=(600,))
            worker.start()
            pids.with_suffix(".new").write_text(str(worker.pid))
            pids.with_suffix(".new").rename(pids)
            time.sleep(600)
            lock.release()

        holder = waiting(hold, pids)
        with pytest.raises(BusyFolder):
            FolderLock(tmp_path / "there", "run")
        holder.kill()
        holder.join()
        try:
            with locked(tmp_path / "there", "run"):
                assert os.kill(int(pids.read_text()), 0) is None, "its worker is alive"
        finally:
            os.kill(int(pids.read_text()), signal.SIGKILL)

    def test_a_fork_does_not_give_back_the_lock_of_its_parent(self, tmp_path):
        with locked(tmp_path, "run"):
            lock = FolderLock(tmp_path / "other", "run")
            in_fork(lock.release)
            assert (tmp_path / "other" / LOCK).exists()
            with pytest.raises(BusyFolder):
                FolderLock(tmp_path / "other", "run")
            lock.release()

    def test_a_file_in_the_way_is_an_error_of_one_line(self, tmp_path):
        (tmp_path / "file").write_text("")
        for place in (tmp_path / "file", tmp_path / "file/below"):
            with pytest.raises(DataError, match=r"cannot write the run in .*file"), locked(place, "run"):
                pass

    def test_a_folder_of_other_things_is_not_claimed(self, tmp_path):
        (tmp_path / LOCK).write_text("")
        (tmp_path / "thesis.tex").write_text(THESIS)
        with pytest.raises(DataError, match=r"holds no work of mapet; move it away \(thesis.tex\)"):
            claim(tmp_path, "cache", ("*.npy",))

    def test_a_folder_with_the_name_of_a_file_is_not_claimed(self, tmp_path):
        (tmp_path / "plan.json").mkdir()
        (tmp_path / "plan.json/thesis.tex").write_text(THESIS)
        with pytest.raises(DataError, match=r"holds no work of mapet; move it away \(plan.json/\)"):
            claim(tmp_path, "cache", ("plan.json", "cache"))


class TestPlaces:
    @pytest.fixture(scope="class")
    @classmethod
    def outputs(cls, tmp_path_factory, images, run):
        """One of each kind of output, by name."""
        folder = tmp_path_factory.mktemp("outputs")
        command = ["tokenize", "--images", images, "--output", folder / "cache", "--features-dir", folder / "sample"]
        assert main([*map(str, (*command, *SIZES, *FIT))]) == 0
        shutil.copytree(run, folder / "run")
        torch.manual_seed(0)
        export(MODEL, MaskedTokenViT(MODEL).state_dict(), folder / "run/timm")
        return folder

    @pytest.mark.parametrize(
        ("around", "kind"),
        [
            ("cache", "token cache"),
            ("cache_tokenizer", "tokenizer"),
            ("sample", "feature sample"),
            ("run/timm", "exported model"),
            ("run/checkpoints/step_000000002", "checkpoint"),
            ("run/checkpoints", "folder of checkpoints"),
            (".cache.partial", "folder of unfinished work"),
            (".cache.replaced", "folder of unfinished work"),
        ],
    )
    def test_no_output_lies_inside_another(self, around, kind, mapet, outputs, images, run):
        before = everything_in(outputs)
        for output in (outputs / around / "deep/new", outputs / around / "new", outputs / around):
            named = (output, outputs / around, f"{kind}, and nothing else may be")
            cache, place = outputs / "cache", ("--output", output)
            mapet.fail("pretrain", "--cache", cache, *place, *TRAINING, code=2, names=named)
            mapet.fail("codebook", "--cache", cache, *place, code=2, names=named)
            mapet.fail("probe", "--checkpoint", run, "--images", images, *place, code=2, names=named)
            if output != outputs / around or kind != "token cache":
                command = ("tokenize", "--images", images, *place, *SIZES, *FIT, "--overwrite")
                mapet.fail(*command, code=2, names=named)
            if output != outputs / around or kind != "exported model":
                mapet.fail("export", "--checkpoint", run, *place, code=2, names=named)
        assert everything_in(outputs) == before

    def test_an_export_and_a_run_may_be_in_a_run(self, outputs):
        check_place(outputs / "run/timm_2", "exported model", staged=True)
        check_place(outputs / "run/second", "run")
        check_place(outputs / "run/timm", "exported model", staged=True)
        check_place(outputs / "run", "run")

    def test_a_link_hides_nothing(self, outputs, tmp_path):
        (tmp_path / "link").symlink_to(outputs / "cache")
        with pytest.raises(ConfigError, match="cache is a token cache"):
            check_place(tmp_path / "link/run", "run")

    @pytest.mark.parametrize(
        ("given", "names"),
        [
            (("--codebook", "cache"), ("--codebook", "--output")),
            (("--codebook", "cache/tokenizer"), ("--codebook", "--output")),
            (("--codebook", "t", "--features-dir", "cache"), ("--features-dir", "--output")),
            (("--codebook", "t", "--features-dir", "t/f"), ("--features-dir", "--codebook")),
            (("--codebook", "."), ("--codebook",)),
        ],
    )
    def test_the_folders_of_one_command_are_apart(self, given, names, mapet, images, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        mapet.fail("tokenize", "--images", images, "--output", "cache", *SIZES, *FIT, *given, code=2, names=names)
        assert not everything_in(tmp_path)

    def test_apart(self, tmp_path):
        check_apart({"--output": tmp_path / "a", "--codebook": tmp_path / "ab", "--features-dir": None})
        with pytest.raises(ConfigError, match=r"--codebook .* is --output"):
            check_apart({"--output": tmp_path / "a", "--codebook": tmp_path / "b/../a/c"})

    @pytest.mark.parametrize("output", ["", ".", "/", "..", "a/.."])
    def test_a_path_without_a_name(self, output, mapet, images, run, tiny, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for command in commands(images, run, tiny):
            mapet.fail(*command, f"--output={output}", code=2, names=("--output", "names no folder"))
        assert not everything_in(tmp_path)

    @pytest.mark.parametrize("length", [250, 300])
    def test_a_long_name(self, length, mapet, images, run, tiny, tmp_path):
        for command in commands(images, run, tiny):
            output = tmp_path / ("n" * length)
            if length == 250 and command[0] not in ("tokenize", "export"):
                check_place(output, "run")
                continue
            mapet.fail(*command, "--output", output, code=2, names=(f"has {length} bytes", "at most 2"))
            outcome = mapet(*command, "--output", tmp_path / ("n" * 300) / "below")
            assert outcome.code in (1, 2) and "Traceback" not in outcome.err and "too long" in outcome.err
        assert not everything_in(tmp_path)

    def test_a_name_of_245_bytes_will_do(self, weights, tmp_path):
        export(MODEL, weights, tmp_path / ("é" * 122 + "n"))
        export(MODEL, weights, tmp_path / ("é" * 122 + "n"))
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_nul(self):
        with pytest.raises(ConfigError, match="names no folder"):
            check_place("a\0b", "run")


def commands(images: Path, run: Path, cache: Path) -> list[tuple[object, ...]]:
    """Every command with an output, without that."""
    return [
        ("tokenize", "--images", images, *SIZES, *FIT),
        ("pretrain", "--cache", cache, *training(vocabulary=32)),
        ("export", "--checkpoint", run),
        ("codebook", "--cache", cache),
        ("probe", "--checkpoint", run, "--images", images),
        ("demo", "--quick"),
    ]
