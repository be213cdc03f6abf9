"""Bad input at the command line: an exit code that is not 0, the file or option by name, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import FIT, PROBE, SIZES, TRAINING, everything_in, pictures, training
from datafakes import flip, no_space
from PIL import Image

from mapet import files
from mapet.cli import main
from mapet.data.cache import TokenCache
from mapet.tokenizers.pixel import PixelTokenizer
from mapet.training import checkpoint
from mapet.training.checkpoint import CheckpointStore


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, images) -> Path:
    """A folder with a token cache, its tokenizer and a run of 2 steps; tests change copies only."""
    folder = tmp_path_factory.mktemp("made")
    tokenizing = ("tokenize", "--images", images, "--output", folder / "cache", *SIZES, *FIT)
    training = ("pretrain", "--cache", folder / "cache", "--output", folder / "run", *TRAINING, "--max-steps", 2)
    for command in (tokenizing, training):
        assert main([str(argument) for argument in command]) == 0
    return folder


@pytest.fixture
def cache(made) -> Path:
    return made / "cache"


@pytest.fixture
def copied_cache(made, tmp_path) -> Path:
    return shutil.copytree(made / "cache", tmp_path / "cache")


class TestImages:
    """`mapet tokenize` on folders as they are found; the tokenizer is saved by an earlier, good run."""

    @pytest.fixture
    def tokenize(self, made, tmp_path):
        def arguments(folder, *more):
            given = ("--codebook", made / "cache_tokenizer", "--output", tmp_path / "out/cache", "--workers", 0)
            return ("tokenize", "--images", folder, *given, *more)

        return arguments

    def test_an_empty_folder(self, mapet, tokenize, tmp_path):
        (tmp_path / "empty/sub").mkdir(parents=True)
        mapet.fail(*tokenize(tmp_path / "empty"), code=1, names=(tmp_path / "empty", "no image", ".jpg"))
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_is_not_there(self, mapet, tokenize, tmp_path):
        mapet.fail(*tokenize(tmp_path / "nowhere"), code=1, names=(tmp_path / "nowhere", "digits"))
        assert not (tmp_path / "out").exists()

    @pytest.fixture
    def with_bad_images(self, tmp_path) -> Path:
        """20 good images; a truncated one, one that is text, an empty one and a dangling link."""
        folder = pictures(tmp_path / "mixed", per_class=10)
        whole = (folder / "bars/00.png").read_bytes()
        (folder / "bars/truncated.png").write_bytes(whole[: len(whole) // 2])
        (folder / "bars/text.jpg").write_text("not an image")
        (folder / "dots/empty.png").touch()
        (folder / "dots/unreadable.png").symlink_to(tmp_path / "nowhere.png")
        return folder

    BAD = ("bars/truncated.png", "bars/text.jpg", "dots/empty.png", "dots/unreadable.png")

    def test_bad_images_within_the_limit_are_skipped_and_counted(self, mapet, tokenize, with_bad_images, tmp_path):
        outcome = mapet.succeed(*tokenize(with_bad_images, "--max-skipped", 0.2))
        assert "20 images" in outcome.out and "skipped 4 images" in outcome.out
        made = TokenCache.open(tmp_path / "out/cache")
        assert sorted(skipped.name for skipped in made.manifest.skipped) == sorted(self.BAD)
        assert not set(self.BAD) & set(made.names) and np.bincount(made.labels).tolist() == [10, 10]
        for name in self.BAD:
            assert str(with_bad_images / name) in outcome.out

    def test_more_bad_images_than_the_limit(self, mapet, tokenize, with_bad_images, tmp_path):
        names = ("max_skipped 0.1 of 24 allows 2", with_bad_images / "bars/text.jpg")
        mapet.fail(*tokenize(with_bad_images, "--max-skipped", 0.1), code=1, names=names)
        assert not everything_in(tmp_path / "out")

    def test_bad_images_stop_a_fit_too(self, mapet, with_bad_images, tmp_path):
        arguments = ("tokenize", "--images", with_bad_images, "--output", tmp_path / "out/cache", *SIZES, *FIT)
        mapet.fail(*arguments, code=1, names=("max_skipped", with_bad_images))
        assert not (tmp_path / "out").exists()

    def test_unusual_images_are_converted(self, mapet, tokenize, tmp_path):
        folder = tmp_path / "unusual"
        folder.mkdir()
        Image.new("RGB", (1, 1), (200, 100, 50)).save(folder / "a_pixel.png")
        Image.new("CMYK", (16, 16), (255, 0, 255, 0)).save(folder / "b_cmyk.jpg", quality=100)
        Image.fromarray(np.full((16, 16), 32896, np.uint16)).save(folder / "c_16_bit.png")
        Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(folder / "d_alpha.png")
        outcome = mapet.succeed(*tokenize(folder, "--max-skipped", 0))
        assert "4 images" in outcome.out and "skipped" not in outcome.out
        colours = TokenCache.open(tmp_path / "out/cache").images(range(4)).float().mean(dim=(2, 3)).round().tolist()
        assert colours[0] == [200, 100, 50]
        assert np.abs(np.subtract(colours[1], [0, 255, 0])).max() <= 3, "cyan and yellow ink is green"
        assert colours[2] == [128, 128, 128]
        assert colours[3] == [255, 255, 255], "transparent on white"

    def test_a_size_that_the_patch_does_not_divide(self, mapet, images, tmp_path):
        sizes = ("--image-size", 30, "--patch-size", 16)
        given = ("--images", images, "--output", tmp_path / "out/cache", *sizes)
        mapet.fail("tokenize", *given, code=2, names=("image_size 30", "patch_size 16"))
        assert not (tmp_path / "out").exists()

    def test_fewer_patches_than_entries(self, mapet, images, tmp_path):
        given = ("--images", images, "--output", tmp_path / "out/cache", *SIZES, *FIT, "--vocabulary", 8192)
        mapet.fail("tokenize", *given, code=1, names=("40 images have 640 patches", "vocabulary of 8192"))
        assert not (tmp_path / "out").exists()

    def test_an_output_folder_with_other_things(self, mapet, made, images):
        before = everything_in(images)
        given = ("--images", images, "--codebook", made / "cache_tokenizer", "--output", images)
        mapet.fail("tokenize", *given, "--workers", 0, code=1, names=(images, "no token cache"))
        assert everything_in(images) == before

    def test_a_cache_of_other_images(self, mapet, tokenize, cache, tmp_path):
        other = pictures(tmp_path / "other", per_class=3)
        before = (cache / "manifest.json").read_bytes()
        mapet.fail(*tokenize(other, "--output", cache), code=1, names=(cache, "is of other images", "--overwrite"))
        assert (cache / "manifest.json").read_bytes() == before

    def test_a_disk_that_is_full(self, mapet, tokenize, images, tmp_path, monkeypatch):
        monkeypatch.setattr(files.NpyWriter, "append", no_space)
        mapet.fail(*tokenize(images), code=1, names=(tmp_path / "out/cache", "the disk is full"))
        assert not everything_in(tmp_path / "out")

    def test_interrupt(self, mapet, tokenize, images, tmp_path, monkeypatch):
        calls, encode = [], PixelTokenizer.encode

        def interrupted(tokenizer, batch):
            calls.append(len(batch))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return encode(tokenizer, batch)

        monkeypatch.setattr(PixelTokenizer, "encode", interrupted)
        assert mapet(*tokenize(images, "--batch-size", 16)).code == 130
        assert calls == [16, 16] and not everything_in(tmp_path / "out")


class TestTokens:
    """Tokens that are not those of the images or of the model."""

    @pytest.fixture
    def importing(self, images, cache, tmp_path):
        """`importing(tokens)` are arguments that import them for the 40 images."""
        rows = [f"{name},{int('dots' in name)}" for name in TokenCache.open(cache).names]
        (tmp_path / "list.csv").write_text("\n".join(["path,class", *rows]) + "\n")

        def arguments(tokens):
            torch.save(tokens, tmp_path / "tokens.pth")
            files = ("--import-tokens", tmp_path / "tokens.pth", "--csv", tmp_path / "list.csv", "--root", images)
            return ("tokenize", *files, "--image-size", 16, "--vocabulary", 16, "--output", tmp_path / "out/cache")

        return arguments

    @pytest.mark.parametrize(
        ("tokens", "said"),
        [
            (torch.full((40, 16), 16), "tokens 16 to 16, allowed are 0 to 15"),
            (torch.full((40, 16), -1), "allowed are 0 to 15"),
            (torch.zeros(39, 16, dtype=torch.int32), "40 images, the token files hold 39 rows"),
            (torch.zeros(40, 15, dtype=torch.int32), "15 tokens an image"),
            (torch.zeros(40, 16), "int16, int32 or int64"),
            ({"tokens": torch.zeros(40, 16)}, "expected one tensor"),
        ],
        ids=["too large", "negative", "other length", "no square", "not integers", "no tensor"],
    )
    def test_token_files(self, tokens, said, mapet, importing, tmp_path):
        mapet.fail(*importing(tokens), code=1, names=(said, "tokens.pth" if "rows" not in said else "list.csv"))
        assert not (tmp_path / "out").exists()

    def test_a_grid_that_does_not_divide_the_image(self, mapet, importing, tmp_path):
        names = ("image_size 16", "grid 5")
        mapet.fail(*importing(torch.zeros(40, 25, dtype=torch.int32)), code=2, names=names)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("model", "said"),
        [
            ({"image_size": 32}, "--model.image-size=16, the model has 32"),
            ({"patch_size": 2}, "--model.patch-size=4, the model has 2"),
            ({"vocabulary": 8}, "--model.vocabulary=16, the model has 8"),
        ],
    )
    def test_a_cache_for_another_model(self, model, said, mapet, cache, tmp_path):
        given = ("--cache", cache, "--output", tmp_path / "run", *training(**model))
        mapet.fail("pretrain", *given, code=1, names=(cache, said))
        assert not (tmp_path / "run").exists()

    def test_a_token_in_the_cache_out_of_range(self, mapet, copied_cache, tmp_path):
        np.save(copied_cache / "tokens.npy", np.full((40, 16), 16, np.uint16))
        manifest = json.loads((copied_cache / "manifest.json").read_text())
        manifest["files"]["tokens.npy"] = vars(files.FileRecord.of(copied_cache / "tokens.npy"))
        (copied_cache / "manifest.json").write_text(json.dumps(manifest))
        given = ("--cache", copied_cache, "--output", tmp_path / "run", *TRAINING)
        names = (copied_cache / "tokens.npy", "token 16, allowed are 0 to 15")
        mapet.fail("pretrain", *given, code=1, names=names)
        assert not (tmp_path / "run").exists()

    def test_a_damaged_cache(self, mapet, copied_cache, tmp_path):
        flip(copied_cache / "tokens.npy")
        given = ("--cache", copied_cache, "--output", tmp_path / "run", *TRAINING)
        mapet.fail("pretrain", *given, code=1, names=(copied_cache / "tokens.npy", "SHA-256"))
        assert not (tmp_path / "run").exists()

    def test_no_cache(self, mapet, tmp_path):
        given = ("--cache", tmp_path / "nowhere", "--output", tmp_path / "run", *TRAINING)
        mapet.fail("pretrain", *given, code=1, names=(tmp_path / "nowhere",))
        assert not everything_in(tmp_path)


@pytest.mark.parametrize(
    ("model", "more", "names"),
    [
        ({"image_size": 18}, (), ("--model.image-size 18", "--model.patch-size 4")),
        ({"heads": 5}, (), ("--model.heads 5", "--model.width 32")),
        ({}, ("--cut", 0), ("--cut", "[1, 16]", "got 0")),
        ({}, ("--cut", 17), ("--cut", "[1, 16]", "got 17")),
        ({}, ("--batch", 41), ("--batch 41", "40 images")),
        ({}, ("--micro-batch", 3), ("--micro-batch 3", "does not divide 8")),
        ({}, ("--workers", -1), ("--workers", "-1")),
        ({}, ("--warmup-epochs", 5), ("--warmup-epochs", "epochs = 4")),
        ({}, ("--device", "cuda:99"), ("cuda:99",)),
    ],
)
def test_options_of_a_run_that_cannot_work(model, more, names, mapet, cache, tmp_path):
    given = ("--cache", cache, "--output", tmp_path / "run", *training(**model), *more)
    mapet.fail("pretrain", *given, code=2, names=names)
    assert not (tmp_path / "run").exists()


class TestRuns:
    """Checkpoints and disks."""

    @pytest.fixture
    def run(self, made, tmp_path) -> Path:
        return shutil.copytree(made / "run", tmp_path / "run")

    @pytest.mark.parametrize("option", [("--lr", 0.1), ("--seed", 7), ("--objective", "pim")])
    def test_a_checkpoint_of_another_configuration(self, option, mapet, cache, run):
        before = everything_in(run)
        names = (run, "another configuration", f"{option[0]} was", f"is {option[1]}", "--fresh")
        mapet.fail("pretrain", "--cache", cache, "--output", run, *TRAINING, *option, code=1, names=names)
        assert everything_in(run) == before

    def test_a_checkpoint_of_other_images(self, mapet, made, run, tmp_path):
        other = pictures(tmp_path / "other", seed=9)
        tokenizer = ("--codebook", made / "cache_tokenizer", "--workers", 0)
        mapet.succeed("tokenize", "--images", other, "--output", tmp_path / "cache", *tokenizer)
        names = (run, "other images or tokens", tmp_path / "cache")
        mapet.fail("pretrain", "--cache", tmp_path / "cache", "--output", run, *TRAINING, code=1, names=names)

    def test_checkpoints_that_are_all_damaged(self, mapet, cache, run):
        file = run / "checkpoints/step_000000002/task.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        given = ("--cache", cache, "--output", run, *TRAINING)
        outcome = mapet.fail("pretrain", *given, code=1, names=(run, "task.safetensors", "--fresh"))
        assert "mapet: warning: checkpoint" in outcome.err
        for command in (("export", "--output", run / "timm"), ("probe", "--images", cache, "--output", run / "p")):
            mapet.fail(*command, "--checkpoint", run, code=1, names=("task.safetensors",))
        assert not (run / "timm").exists() and not (run / "p").exists()

    def test_a_disk_that_is_full(self, mapet, cache, run, monkeypatch):
        monkeypatch.setattr(checkpoint, "write_through", no_space)
        arguments = ("pretrain", "--cache", cache, "--output", run, *TRAINING, "--max-steps", 3)
        mapet.fail(*arguments, code=1, names=(run, "the disk is full", "step_000000002"))
        assert CheckpointStore(run / "checkpoints").steps() == [2]
        assert not [name for name in everything_in(run) if "partial" in name]
        monkeypatch.undo()
        assert "going on from step 2" in mapet.succeed(*arguments).out

    def test_a_disk_that_is_full_for_the_scores(self, mapet, made, cache, tmp_path, monkeypatch):
        monkeypatch.setattr("mapet.files.os.replace", no_space)
        given = ("--images", cache, "--output", tmp_path / "p", *PROBE)
        mapet.fail("probe", "--checkpoint", made / "run", *given, code=1, names=(tmp_path / "p", "No space left"))
        assert not [name for name in everything_in(tmp_path / "p") if "scores" in name or name.endswith(".npy")]

    def test_a_loss_that_diverges(self, mapet, cache, tmp_path):
        wild = ("--lr", 1e3, "--warmup-epochs", 0, "--optim.clip", 0, "--train.log-every", 1)
        given = ("--cache", cache, "--output", tmp_path / "run", *TRAINING, *wild)
        mapet.fail("pretrain", *given, code=1, names=("before the weights changed", "Lower --lr or"))


class TestProbe:
    def test_no_class_folders(self, mapet, made, images, tmp_path):
        flat = tmp_path / "flat"
        shutil.copytree(images / "bars", flat)
        given = ("--images", flat, "--output", tmp_path / "p", *PROBE)
        mapet.fail("probe", "--checkpoint", made / "run", *given, code=1, names=(flat, "no labels", "CLASS"))
        assert not (tmp_path / "p").exists()

    def test_one_class(self, mapet, made, images, tmp_path):
        shutil.copytree(images / "bars", tmp_path / "one/bars")
        given = ("--images", tmp_path / "one", "--output", tmp_path / "p", *PROBE)
        mapet.fail("probe", "--checkpoint", made / "run", *given, code=1, names=("one class", "bars"))
        assert not (tmp_path / "p").exists()

    def test_fewer_images_of_a_class_than_asked_for(self, mapet, made, images, tmp_path):
        given = ("--images", images, "--output", tmp_path / "p", *PROBE, "--labels-per-class", 17)
        mapet.fail("probe", "--checkpoint", made / "run", *given, code=1, names=("17 labels per class", "'bars' (16)"))
        assert not (tmp_path / "p").exists()

    def test_an_unreadable_image(self, mapet, made, images, tmp_path):
        folder = shutil.copytree(images, tmp_path / "images")
        (folder / "bars/text.png").write_text("not an image")
        given = ("--images", folder, "--output", tmp_path / "p", *PROBE)
        mapet.fail("probe", "--checkpoint", made / "run", *given, code=1, names=(folder / "bars/text.png",))
        assert not [name for name in everything_in(tmp_path / "p") if name != "features"]

    def test_a_cache_of_another_size(self, mapet, made, images, tmp_path):
        sizes = ("--image-size", 8, "--patch-size", 4, "--vocabulary", 16)
        mapet.succeed("tokenize", "--images", images, "--output", tmp_path / "small", *sizes, *FIT)
        given = ("--images", tmp_path / "small", "--output", tmp_path / "p", *PROBE)
        mapet.fail("probe", "--checkpoint", made / "run", *given, code=1, names=("8 x 8", "16 x 16"))


class TestExport:
    def test_a_folder_with_other_things(self, mapet, made, images):
        before = everything_in(images)
        mapet.fail("export", "--checkpoint", made / "run", "--output", images, code=2, names=(images, "bars"))
        assert everything_in(images) == before

    def test_a_class_token_that_is_not_there(self, mapet, cache, tmp_path):
        training = ("pretrain", "--cache", cache, "--output", tmp_path / "run", *TRAINING, "--max-steps", 1)
        mapet.succeed(*training, "--model.no-class-token")
        given = ("--checkpoint", tmp_path / "run", "--output", tmp_path / "timm", "--pool", "token")
        mapet.fail("export", *given, code=2, names=("token", "avg"))
        assert not (tmp_path / "timm").exists()
