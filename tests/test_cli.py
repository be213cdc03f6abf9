"""The command line: help, exit codes, messages, and the whole job from a folder of images to a timm model."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from command_line import FIT, PROBE, SIZES, TRAINING, everything_in, pictures
from PIL import Image
from safetensors.torch import load_file

from mapet import __version__
from mapet.commands import tokenize as tokenize_command
from mapet.commands.options import COMMANDS
from mapet.data.cache import TokenCache
from mapet.errors import CheckpointError, ConfigError, DataError
from mapet.tokenizers import load_tokenizer
from mapet.tokenizers.pixel import PixelTokenizer
from mapet.training.checkpoint import CheckpointStore


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, images) -> Path:
    """A token cache, with its tokenizer beside it."""
    from mapet.cli import main

    path = tmp_path_factory.mktemp("data") / "cache"
    assert main([*map(str, ("tokenize", "--images", images, "--output", path, *SIZES, *FIT))]) == 0
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache) -> Path:
    """A run of 3 steps."""
    from mapet.cli import main

    path = tmp_path_factory.mktemp("runs") / "run"
    assert main([*map(str, ("pretrain", "--cache", cache, "--output", path, *TRAINING, "--max-steps", 3))]) == 0
    return path


class TestHelp:
    @pytest.mark.parametrize("columns", [80, 120])
    @pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda command: " ".join(command))
    def test_it_fits_the_screen_and_says_what_each_option_is(self, command, columns, mapet, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(columns))
        text, _, examples = mapet.succeed(*command, "--help").out.partition("\nExamples:\n")
        lines = text.splitlines()
        assert max(map(len, lines)) <= columns
        assert len(lines) <= 75 or {"pretrain", "plan"} & {*command}
        assert not command or examples.startswith(f"  mapet {command[0]} ")
        for line, below in pairwise(lines):
            if re.match("  --[a-z]", line):
                assert re.search(r"\S  +\S", line) or re.match(" {6,}[^-]", below), f"{line} has no help"

    def test_a_run_has_a_group_for_each_section_with_defaults_and_ranges(self, mapet, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        text = mapet.succeed("pretrain", "--recipe", "vit_base_kclip", "--help").out
        for section in ("model", "objective", "data", "optim", "train", "speed"):
            assert f"\n {section} options " in text
        lines = " ".join(text.split())
        for said in (
            "--model.width INT Numbers in a token. (default: 768; at least 1)",
            "--cut INT, --objective.cut INT Tokens that are not predicted, the class token included (the paper's c: 50 "
            "for ViT-T and ViT-S, 60 for ViT-B). (default: 60)",
            "Largest global gradient norm; 0 turns clipping off. (default: 3.0; not negative)",
            "--optim.beta1 FLOAT Decay of AdamW's mean of the gradients. (default: 0.9; in [0, 1))",
            "83.6 % top-1",
        ):
            assert said in lines
        assert "--masked" in mapet.succeed("plan", "--objective", "mim", "--help").out

    def test_without_arguments_it_is_the_help(self, mapet):
        assert mapet.succeed().out == mapet.succeed("--help").out

    def test_version(self, mapet):
        assert mapet.succeed("--version").out == f"mapet {__version__}\n"

    def test_it_does_not_wait_for_torch(self):
        code = "import sys, mapet.cli\nfor name in ('--help', 'tokenize', 'probe', 'export'):\n"
        code += "    try: mapet.cli.main([name, '--help'])\n    except SystemExit: pass\n"
        code += "print({'torch', 'timm', 'sklearn'} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.splitlines()[-1] == "set()"

    @pytest.mark.parametrize("arguments", [("tokenise",), ("export", "--checkpoint", "x"), ("demo", "--sedes", 3)])
    def test_what_cannot_be_parsed_exits_with_2(self, arguments, mapet):
        outcome = mapet(*arguments)
        assert outcome.code == 2 and outcome.err and not outcome.out


def test_the_kernels_need_no_mapet_and_wait_for_no_compiler():
    code = "import sys, mapet_kernels\n"
    code += "print([x for x in sys.modules if x.partition('.')[0] == 'mapet' or x in ('torch._dynamo', 'sympy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


class TestExits:
    """What `main` makes of exceptions; the command is a stand-in."""

    @pytest.mark.parametrize(("kind", "code"), [(ConfigError, 2), (DataError, 1), (CheckpointError, 1)])
    def test_expected_failures_are_a_line(self, kind, code, failing):
        outcome = failing(kind("what to do"))
        assert (outcome.code, outcome.out, outcome.err) == (code, "", "mapet: error: what to do\n")

    def test_interrupt(self, failing):
        outcome = failing(KeyboardInterrupt())
        assert outcome.code == 130 and outcome.err.startswith("mapet: interrupted: ")

    def test_a_full_disk_anywhere(self, failing):
        outcome = failing(OSError(errno.ENOSPC, "No space left on device", "events.out"))
        assert outcome.code == 1 and "the disk is full" in outcome.err and "events.out" in outcome.err

    @pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug"), KeyError("bug"), AttributeError("bug")])
    def test_a_bug_keeps_its_traceback(self, error, failing):
        with pytest.raises(type(error)):
            failing(error)

    def test_processes_of_torchrun_say_who_they_are(self, failing, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", "3")
        assert failing(DataError("no")).err == "mapet: error (process 3): no\n"

    def test_warnings_of_others_stay_as_they_are(self, mapet, monkeypatch):
        def run(options):
            import warnings

            warnings.warn("from elsewhere", UserWarning, stacklevel=1)
            return 0

        monkeypatch.setattr(tokenize_command, "run", run)
        with pytest.warns(UserWarning, match="from elsewhere"):
            outcome = mapet.succeed("tokenize", "--images", "x")
        assert "mapet: " not in outcome.err


def test_the_next_command_can_be_pasted(mapet, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = mapet.succeed("tokenize", "--images", images, "--output", "a [b] c", *SIZES, *FIT)
    (line,) = (line for line in made.out.splitlines() if line.startswith("next: mapet "))
    small = ("--model.width", 32, "--model.depth", 1, "--model.heads", 2, "--workers", 0)
    done = mapet.succeed(*shlex.split(line.removeprefix("next: mapet ")), *small, "--max-steps", 1, "--device", "cpu")
    assert "1 of 1 steps are done" in done.out


def test_from_a_folder_of_images_to_a_timm_model(mapet, images, tmp_path, monkeypatch):
    """The main job, each command with what the one before it printed or wrote."""
    monkeypatch.chdir(tmp_path)
    made = mapet.succeed("tokenize", "--images", images, "--output", "cache", *SIZES, *FIT)
    assert "40 images" in made.out and "perplexity" in made.out and "dead" in made.out
    next_line = next(line for line in made.out.splitlines() if line.startswith("next: mapet pretrain"))
    sizes = next_line.removeprefix("next: mapet pretrain").split()
    assert {"--model.image-size", "--model.patch-size", "--model.vocabulary", "--cut", "--batch"} < set(sizes)

    training = ("pretrain", "--cache", "cache", "--output", "run", *TRAINING)
    first = mapet.succeed(*training, "--max-steps", 3)
    assert "3 of 3 steps" in first.out and "run/checkpoints/step_000000003" in first.out
    resumed = mapet.succeed(*training, "--max-steps", 6)
    assert "going on from step 3" in resumed.out and "6 of 6 steps" in resumed.out
    assert [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()][-1] == 6

    probed = mapet.succeed(
        "probe", "--checkpoint", "run", "--images", images, "--output", "probe", "--baselines", *PROBE
    )
    assert "32 training images, 8 test images, 2 classes" in probed.out and "raw pixels" in probed.out
    results = json.loads(Path("probe/scores.json").read_text())["results"]
    assert set(results) == {"run", "random initialisation", "raw pixels"}
    assert all(0 <= score["accuracy"] <= 1 for result in results.values() for score in result["scores"])

    exported = mapet.succeed("export", "--checkpoint", "run", "--output", "run/timm")
    line = exported.out.rpartition("load it with: ")[2].strip()
    model = eval(line, {"timm": timm})
    weights = load_file("run/checkpoints/step_000000006/task.safetensors")
    assert torch.equal(model.pos_embed, weights["model.pos_embed"])
    again = mapet.succeed("probe", "--checkpoint", "run/timm", "--images", images, "--output", "probe_timm", *PROBE)
    assert "run/timm" in again.out
    assert json.loads(Path("probe_timm/scores.json").read_text())["results"]["run/timm"] == results["run"]

    found = mapet.succeed("doctor", "--cache", "cache", "--run", "run").out
    assert "every byte is as it" in " ".join(found.replace("│", " ").split()) and "run, step 6" in found


class TestTokenize:
    def test_the_same_command_again_reuses_everything(self, mapet, images, cache):
        before = {path: path.stat().st_mtime_ns for path in cache.parent.rglob("*")}
        again = mapet.succeed("tokenize", "--images", images, "--output", cache, *SIZES, *FIT)
        assert "using the tokenizer pixel" in again.out and "reused as it is" in again.out
        assert {path: path.stat().st_mtime_ns for path in cache.parent.rglob("*")} == before

    def test_a_saved_tokenizer_for_other_images(self, mapet, cache, tmp_path):
        other = pictures(tmp_path / "other", per_class=3, seed=5)
        saved = cache.with_name("cache_tokenizer")
        mapet.succeed("tokenize", "--images", other, "--output", tmp_path / "c", "--codebook", saved, "--workers", 0)
        made = TokenCache.open(tmp_path / "c")
        assert made.manifest.description.tokenizer_fingerprint == load_tokenizer(saved).fingerprint()
        assert (len(made), made.image_size, made.vocabulary) == (6, 16, 16), "sizes are the tokenizer's"
        assert not (tmp_path / "c_tokenizer").exists()

    def test_a_new_folder_gets_the_tokenizer(self, mapet, images, tmp_path):
        folder = tmp_path / "books/pixel"
        mapet.succeed("tokenize", "--images", images, "--output", tmp_path / "c", "--codebook", folder, *SIZES, *FIT)
        assert load_tokenizer(folder).codebook.shape == (16, 48)
        description = TokenCache.open(tmp_path / "c").manifest.description
        assert description.tokenizer_fingerprint == load_tokenizer(folder).fingerprint()

    def test_centroids_from_a_file(self, mapet, images, cache, tmp_path):
        codebook = load_tokenizer(cache.with_name("cache_tokenizer")).codebook
        np.save(tmp_path / "centroids.npy", codebook.numpy())
        given = ("--codebook", tmp_path / "centroids.npy", "--output", tmp_path / "c", "--workers", 0)
        mapet.succeed("tokenize", "--images", images, *given, *SIZES)
        ids = torch.arange(40)
        assert torch.equal(TokenCache.open(tmp_path / "c").tokens(ids), TokenCache.open(cache).tokens(ids))

    def test_overwriting_fits_a_new_tokenizer(self, mapet, images, tmp_path):
        arguments = ("tokenize", "--images", images, "--output", tmp_path / "c", *SIZES, *FIT)
        mapet.succeed(*arguments)
        before = TokenCache.open(tmp_path / "c").manifest.description.tokenizer_fingerprint
        mapet.succeed(*arguments, "--overwrite", "--seed", 7)
        assert TokenCache.open(tmp_path / "c").manifest.description.tokenizer_fingerprint != before

    def test_a_cache_in_the_way_is_seen_before_the_fit(self, mapet, images, cache, tmp_path, monkeypatch):
        monkeypatch.setattr(PixelTokenizer, "fit", lambda *a, **k: pytest.fail("it fitted first"))
        new = ("--codebook", tmp_path / "new", "--output", cache)
        mapet.fail("tokenize", "--images", images, *new, *SIZES, *FIT, code=1, names=(cache, "overwrite"))

    def test_a_tokenizer_of_other_settings(self, mapet, images, cache):
        arguments = ("tokenize", "--images", images, "--output", cache, *FIT)
        names = ("--vocabulary 32", cache.with_name("cache_tokenizer"), "has 16")
        mapet.fail(*arguments, "--vocabulary", 32, code=2, names=names)
        mapet.fail(*arguments, "--tokenizer", "kclip", code=2, names=("--tokenizer kclip", "has pixel"))

    def test_a_codebook_folder_with_other_things(self, mapet, images, tmp_path):
        given = ("--codebook", images, "--output", tmp_path / "c", *SIZES)
        mapet.fail("tokenize", "--images", images, *given, code=2, names=(f"--codebook {images}", "new folder"))
        assert not everything_in(tmp_path)

    def test_a_collapsed_codebook_is_loud(self, mapet, tmp_path):
        (tmp_path / "grey").mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (i // 3,) * 3).save(tmp_path / f"grey/{i}.png")
        given = ("--images", tmp_path / "grey", "--output", tmp_path / "c", *SIZES, *FIT)
        outcome = mapet.succeed("tokenize", *given)
        assert "mapet: warning: the codebook of tokenizer pixel has COLLAPSED" in outcome.err
        assert "COLLAPSED" in outcome.out and ".py" not in outcome.err

    def test_tokens_of_the_official_code(self, mapet, images, cache, tmp_path):
        names = TokenCache.open(cache).names
        tokens = TokenCache.open(cache).tokens(torch.arange(40)).int()
        torch.save(tokens[:25], tmp_path / "index_0.pth")
        torch.save(tokens[25:], tmp_path / "index_1.pth")
        lines = [f"{name},{int('dots' in name)}" for name in names]
        (tmp_path / "list.csv").write_text("\n".join(["path,class", *lines]) + "\n")
        shards = (tmp_path / "index_0.pth", tmp_path / "index_1.pth")
        given = ("--csv", tmp_path / "list.csv", "--root", images, "--output", tmp_path / "c", "--workers", 0)
        sizes = ("--image-size", 16, "--vocabulary", 16)
        mapet.succeed("tokenize", "--import-tokens", *shards, *given, *sizes)
        made = TokenCache.open(tmp_path / "c")
        assert torch.equal(made.tokens(torch.arange(40)).int(), tokens) and made.tokenizer == "kclip"

    @pytest.mark.parametrize(
        ("arguments", "names"),
        [
            ((), ("--images", "--import-tokens")),
            (("--images", "digits", "--import-tokens", "x.pth"), ("--images", "--import-tokens")),
            (("--import-tokens", "x.pth", "--csv", "y.csv"), ("--root",)),
            (("--images", "digits", "--csv", "y.csv"), ("--csv", "--import-tokens")),
            (("--import-tokens", "x", "--csv", "y", "--root", "z", "--patch-size", 4), ("--patch-size", "--images")),
            (("--images", "digits", "--weights", "RN50x64.pt"), ("kclip",)),
            (("--images", "digits", "--device", "tpu"), ("tpu", "cuda:N")),
        ],
    )
    def test_options_that_do_not_go_together(self, arguments, names, mapet, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        mapet.fail("tokenize", *arguments, code=2, names=names)
        assert not everything_in(tmp_path)

    def test_missing_weights(self, mapet, images, tmp_path):
        given = ("--tokenizer", "kclip", "--weights", tmp_path / "RN50x64.pt", "--output", tmp_path / "c")
        mapet.fail("tokenize", "--images", images, *given, code=1, names=(tmp_path / "RN50x64.pt", "hf download"))


class TestPretrain:
    def test_fresh_keeps_the_earlier_run_aside(self, mapet, cache, tmp_path):
        training = ("pretrain", "--cache", cache, "--output", tmp_path / "run", *TRAINING)
        mapet.succeed(*training, "--max-steps", 2)
        mapet.succeed(*training, "--max-steps", 1, "--fresh")
        assert CheckpointStore(tmp_path / "run/checkpoints").steps() == [1]
        assert CheckpointStore(tmp_path / "run/before_1/checkpoints").steps() == [2]

    def test_only_the_main_process_reports(self, mapet, monkeypatch):
        result = SimpleNamespace(exit_code=143)
        monkeypatch.setattr("mapet.training.loop.pretrain", lambda config: result)
        monkeypatch.setenv("RANK", "1")
        outcome = mapet("pretrain")
        assert outcome.code == 143 and outcome.out == ""

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_leaves_a_checkpoint_to_go_on_from(self, number, code, mapet, cache, tmp_path):
        output = tmp_path / "run"
        training = ["pretrain", "--cache", cache, "--output", output, *TRAINING, "--train.log-every=1"]
        command = [sys.executable, "-m", "mapet", *map(str, training), "--optim.cooldown-epochs=10000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not _size(output / "metrics.jsonl"):
                time.sleep(0.02)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, err) == (code, "")
        (step,) = CheckpointStore(output / "checkpoints").steps()
        assert f"stopped by {number.name} after step {step}" in out and f"step_{step:09d}" in out
        more = ("--optim.cooldown-epochs=10000", "--max-steps", step + 1)
        assert f"going on from step {step}" in mapet.succeed(*training, *more).out

    @pytest.mark.long
    def test_two_processes_of_torchrun(self, cache, tmp_path):
        training = ("pretrain", "--cache", cache, "--output", tmp_path / "run", *TRAINING, "--max-steps", 2)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mapet"]
        done = subprocess.run([*launch, *map(str, training)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("2 of 2 steps are done") == 1
        assert CheckpointStore(tmp_path / "run/checkpoints").steps() == [2]


class TestProbe:
    def test_features_are_kept_and_reused(self, mapet, finished, images, tmp_path, monkeypatch):
        arguments = ("probe", "--checkpoint", finished, "--images", images, "--output", tmp_path / "p", *PROBE)
        first = mapet.succeed(*arguments, "--views", 1)
        assert len(list((tmp_path / "p/features").glob("*.npy"))) == 3, "training images, test images, random views"
        monkeypatch.setattr("mapet.evaluate.features._block_features", lambda *a: pytest.fail("computed again"))
        second = mapet.succeed(*arguments, "--views", 1)
        assert second.out == first.out

    def test_other_images_and_weights_have_features_of_their_own(self, mapet, finished, images, tmp_path):
        other = pictures(tmp_path / "other", seed=3)
        for folder in (images, other):
            mapet.succeed("probe", "--checkpoint", finished, "--images", folder, "--output", tmp_path / "p", *PROBE)
        assert len(list((tmp_path / "p/features").glob("*.npy"))) == 4

    def test_methods(self, mapet, finished, cache, tmp_path):
        given = ("--images", cache, "--output", tmp_path / "p", *PROBE, "--labels-per-class", 0)
        mapet.succeed("probe", "--checkpoint", finished, *given, "--methods", "knn")
        (result,) = json.loads((tmp_path / "p/scores.json").read_text())["results"].values()
        assert [score["method"] for score in result["scores"]] == ["kNN, k = 5", "kNN, k = 1"]

    def test_a_test_folder_is_matched_by_class_names(self, mapet, finished, tmp_path):
        train, test = pictures(tmp_path / "train", classes=("arcs", "bars", "dots")), tmp_path / "test"
        test.mkdir()
        for name in ("bars", "dots"):
            (test / name).symlink_to(train / name)
        given = ("--images", train, "--test-images", test, "--output", tmp_path / "p", *PROBE, "--methods", "knn")
        mapet.succeed("probe", "--checkpoint", finished, *given)
        (result,) = json.loads((tmp_path / "p/scores.json").read_text())["results"].values()
        nearest = [score["accuracy"] for score in result["scores"] if score["method"] == "kNN, k = 1"]
        assert nearest[0] == 1.0, "each test image is in the training folder, in a class of another number"

    def test_a_class_that_was_not_trained_on(self, mapet, finished, images, tmp_path):
        other = pictures(tmp_path / "test", per_class=2, classes=("bars", "waves"))
        given = ("--images", images, "--test-images", other, "--output", tmp_path / "p", *PROBE)
        mapet.fail("probe", "--checkpoint", finished, *given, code=1, names=(other, "waves"))

    def test_the_average_that_a_run_does_not_have(self, mapet, finished, images, tmp_path):
        given = ("--images", images, "--output", tmp_path / "p", "--ema")
        mapet.fail("probe", "--checkpoint", finished, *given, code=1, names=("moving average", "train.ema_decay"))

    def test_what_is_no_checkpoint(self, mapet, images, tmp_path):
        for command in (("probe", "--images", images), ("export",)):
            outcome = (*command, "--checkpoint", images, "--output", tmp_path / "p")
            mapet.fail(*outcome, code=1, names=(images, "holds no checkpoint"))
        assert not everything_in(tmp_path)


def test_demo_gets_its_options(mapet, monkeypatch):
    seen = []
    monkeypatch.setattr("mapet.commands.demo.run_demo", lambda output, **options: seen.append((output, options)))
    mapet.succeed("demo", "--output", "here", "--seeds", 2, "--quick")
    assert seen == [(Path("here"), {"seeds": 2, "device": "auto", "quick": True})]


def _size(path: Path) -> int:
    return os.path.getsize(path) if path.exists() else 0
