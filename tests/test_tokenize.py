"""Tokenising: each image once, in order, bad ones counted, nothing half-written, a stale cache refused."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datafakes import BrightnessTokenizer, NoiseSource, entries
from PIL import Image

from mapet import progress
from mapet.data.cache import TokenCache
from mapet.data.decode import centre_square
from mapet.data.sources import open_source
from mapet.data.stages import TimeUse
from mapet.errors import ConfigError, DataError
from mapet.tokenizers import make_tokenizer
from mapet.tokenizers.encode import tokenize
from mapet.tokenizers.fitting.fit import FitConfig, fit_tokenizer

TOKENIZER = BrightnessTokenizer()


class TestTokenize:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_cache_holds_each_image_and_its_tokens(self, tmp_path, workers):
        source = NoiseSource(11)
        report = tokenize(source, TOKENIZER, tmp_path / "cache", image_size=8, batch_size=4, workers=workers)
        cache = TokenCache.open(tmp_path / "cache")
        made = cache.manifest.description
        assert (made.source_fingerprint, made.tokenizer) == (source.fingerprint(), TOKENIZER.name)
        assert made.tokenizer_fingerprint == TOKENIZER.fingerprint()
        cache.verify()
        assert cache.names == source.names and cache.labels.tolist() == source.labels.tolist()
        for index in range(11):
            image = source.load(index)
            assert np.array_equal(cache.images([index])[0].numpy(), centre_square(image, 8))
            assert torch.equal(cache.tokens([index]), TOKENIZER.encode(TOKENIZER.prepare(image)[None]))
        assert (report.images, report.skipped, report.reused) == (11, (), False)
        counts = torch.bincount(cache.tokens(range(11)).flatten(), minlength=32)
        assert report.usage.counts.tolist() == counts.tolist()
        assert report.images_per_second > 0 and "11 images" in report.summary()

    def test_digits(self, tmp_path):
        report = tokenize(open_source("digits"), TOKENIZER, tmp_path / "cache", image_size=8, workers=0)
        cache = TokenCache.open(tmp_path / "cache")
        assert report.images == len(cache) == 1797 and cache.classes == list("0123456789")

    def test_each_image_is_decoded_once(self, tmp_path, monkeypatch):
        source, loaded = NoiseSource(9), []
        load = source.load
        monkeypatch.setattr(source, "load", lambda index: loaded.append(index) or load(index))
        tokenize(source, TOKENIZER, tmp_path / "cache", image_size=8, batch_size=4, workers=0)
        assert loaded == list(range(9))

    def test_bad_images_are_skipped_counted_and_listed(self, tmp_path):
        source = NoiseSource(20, bad=[0, 7])
        report = tokenize(source, TOKENIZER, tmp_path / "cache", image_size=8, batch_size=1, workers=0, max_skipped=0.1)
        cache = TokenCache.open(tmp_path / "cache")
        kept = [index for index in range(20) if index not in (0, 7)]
        assert cache.names == [source.names[index] for index in kept]
        assert cache.labels.tolist() == [index % 2 for index in kept]
        assert [item.name for item in report.skipped] == ["noise_0", "noise_7"]
        assert tuple(cache.manifest.skipped) == report.skipped
        assert "skipped 2 images" in report.summary() and "noise_7: broken" in report.summary()
        assert np.array_equal(cache.images([6])[0].numpy(), centre_square(source.load(8), 8))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_too_many_bad_images_leave_nothing(self, tmp_path, workers):
        with pytest.raises(DataError, match=r"2 unreadable images.*0.05 of 20 allows 1.*noise_3: broken"):
            tokenize(
                NoiseSource(20, bad=[3, 15]),
                TOKENIZER,
                tmp_path / "cache",
                image_size=8,
                workers=workers,
                max_skipped=0.05,
            )
        assert list(tmp_path.iterdir()) == []

    def test_all_images_bad(self, tmp_path):
        with pytest.raises(DataError, match="no image"):
            tokenize(NoiseSource(2, bad=[0, 1]), TOKENIZER, tmp_path / "c", image_size=8, workers=0, max_skipped=1)
        assert list(tmp_path.iterdir()) == []

    def test_broken_files_in_a_real_folder(self, tmp_path):
        for index in range(8):
            pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        (tmp_path / "8.png").write_bytes((tmp_path / "7.png").read_bytes()[:300])
        (tmp_path / "9.jpg").write_text("not an image")
        report = tokenize(
            open_source(tmp_path), TOKENIZER, tmp_path / "out/cache", image_size=8, workers=2, max_skipped=0.2
        )
        assert report.images == 8 and [item.name for item in report.skipped] == ["8.png", "9.jpg"]

    def test_a_matching_cache_is_reused(self, tmp_path):
        first = tokenize(NoiseSource(5), TOKENIZER, tmp_path / "cache", image_size=8, workers=0)
        before = entries(tmp_path)
        source = NoiseSource(5, bad=range(5))  # would fail if any image were read
        again = tokenize(source, TOKENIZER, tmp_path / "cache", image_size=8, workers=0)
        assert again.reused and again.images == 5
        assert again.usage.counts.tolist() == first.usage.counts.tolist()
        assert "reused" in again.summary()
        assert entries(tmp_path) == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"source": NoiseSource(6)}, "is of other images, or these have changed since"),
            ({"tokenizer": BrightnessTokenizer(input_size=32)}, "tokenizer_fingerprint is"),
            ({"image_size": 16}, "image_size is 8, expected 16"),
            ({"tokenizer": BrightnessTokenizer(grid=2)}, "grid is 4, expected 2"),
            ({"tokenizer": BrightnessTokenizer(vocabulary=64)}, "vocabulary is 32, expected 64"),
        ],
    )
    def test_a_stale_cache_is_refused_unless_overwritten(self, tmp_path, change, message):
        wanted = {"source": NoiseSource(5), "tokenizer": TOKENIZER, "image_size": 8}
        tokenize(output=tmp_path / "cache", workers=0, **wanted)
        before = entries(tmp_path)
        with pytest.raises(DataError, match=rf"cache(/manifest\.json:)? {message}.*overwrite"):
            tokenize(output=tmp_path / "cache", workers=0, **{**wanted, **change})
        assert entries(tmp_path) == before
        report = tokenize(output=tmp_path / "cache", workers=0, overwrite=True, **{**wanted, **change})
        assert not report.reused and len(TokenCache.open(tmp_path / "cache")) == report.images

    def test_a_damaged_cache_is_refused_unless_overwritten(self, tmp_path):
        tokenize(NoiseSource(5), TOKENIZER, tmp_path / "cache", image_size=8, workers=0)
        (tmp_path / "cache/tokens.npy").write_bytes(b"")
        with pytest.raises(DataError, match=r"tokens\.npy has 0 bytes"):
            tokenize(NoiseSource(5), TOKENIZER, tmp_path / "cache", image_size=8, workers=0)
        tokenize(NoiseSource(5), TOKENIZER, tmp_path / "cache", image_size=8, workers=0, overwrite=True)
        assert len(TokenCache.open(tmp_path / "cache")) == 5

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": 10}, "image_size 10 is not divisible by the tokenizer's grid 4"),
            ({"batch_size": 0}, "batch_size"),
            ({"workers": -1}, "workers"),
            ({"max_skipped": 1.5}, "max_skipped"),
        ],
    )
    def test_bad_options(self, tmp_path, options, message):
        with pytest.raises(ConfigError, match=message):
            tokenize(NoiseSource(5), TOKENIZER, tmp_path / "cache", **{"image_size": 8, "workers": 0, **options})
        assert list(tmp_path.iterdir()) == []

    def test_a_tokenizer_that_breaks_its_promise(self, tmp_path):
        class Wrong(BrightnessTokenizer):
            def encode(self, images):
                return super().encode(images) + 32

        with pytest.raises(DataError, match="allowed are 0 to 31"):
            tokenize(NoiseSource(5), Wrong(), tmp_path / "cache", image_size=8, workers=0)
        assert list(tmp_path.iterdir()) == []

    def test_the_global_random_state_is_left_alone(self, tmp_path):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        tokenize(NoiseSource(5), TOKENIZER, tmp_path / "cache", image_size=8, workers=2)
        assert torch.equal(torch.get_rng_state(), before)

    def test_ctrl_c_before_a_shard_is_finished_leaves_nothing(self, tmp_path):
        script = (
            # A runner started in the background ignores SIGINT, and so do its children unless told otherwise.
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "import sys, time; sys.path.insert(0, sys.argv[2])\n"
            "from datafakes import BrightnessTokenizer, NoiseSource\n"
            "from mapet.tokenizers.encode import tokenize\n"
            "class Slow(NoiseSource):\n"
            "    def load(self, index):\n"
            "        time.sleep(0.05); return super().load(index)\n"
            "tokenize(Slow(5000), BrightnessTokenizer(), sys.argv[1], image_size=8, batch_size=1, workers=2)\n"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "cache"), str(Path(__file__).parent)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob(".cache.partial/cache/images_00000.npy")) and time.monotonic() < deadline:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode in (130, -signal.SIGINT) and "KeyboardInterrupt" in stderr
        assert list(tmp_path.iterdir()) == []

    def test_the_report_says_where_the_time_went(self, tmp_path):
        tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
        fit_tokenizer(tokenizer, NoiseSource(20), tmp_path / "tokenizer", FitConfig(iterations=1, redos=1), workers=0)
        report = tokenize(NoiseSource(20), tokenizer, tmp_path / "cache", image_size=16, batch_size=4, workers=0)
        assert list(report.time.waited) == ["decode", "network", "assign", "write"]
        assert all(seconds > 0 for seconds in report.time.waited.values())
        assert sum(report.time.shares().values()) == pytest.approx(1) and report.time.shares()["other"] < 1
        assert report.time.images == 20 and f"bottleneck is {report.time.bottleneck}" in report.summary()


class TestTimeUse:
    def test_shares_and_bottleneck(self):
        used = TimeUse(seconds=10.0, images=500, waited={"decode": 6.0, "network": 3.0}, total=10.0)
        assert used.images_per_second == 50 and used.bottleneck == "decode"
        assert used.shares() == pytest.approx({"decode": 0.6, "network": 0.3, "other": 0.1})
        assert used.line().startswith("time waited for: decode 60%, network 30%, other 10%; the bottleneck is decode (")
        assert "--workers" in used.line()

    def test_over_processes(self):
        """The slowest sets the speed; the shares are of the time of all."""
        ranks = [TimeUse(10.0, 300, {"decode": 6.0}, 10.0), TimeUse(5.0, 200, {"decode": 1.0, "network": 4.0}, 5.0)]
        used = TimeUse.over(ranks)
        assert (used.images_per_second, used.total) == (50, 15)
        assert used.shares() == pytest.approx({"decode": 7 / 15, "network": 4 / 15, "other": 4 / 15})

    def test_nothing_measured(self):
        used = TimeUse(0.0, 0, {}, 0.0)
        assert (used.images_per_second, used.shares(), used.bottleneck) == (0, {}, None)


class TestReport:
    def test_plain_lines_when_not_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        with progress.progress(10, "tokenising") as advance:
            advance(4)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("tokenising: 4/10 images, ") and lines[0].endswith(" left")
        assert progress.progress_line("x", 20, 100, 10.0) == "x: 20/100 images, 2 images/s, 0:00:40 left"
        assert progress.progress_line("x", 0, 100, 0.0) == "x: 0/100 images, 0 images/s, 0:00:00 left"

    def test_a_bar_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        with progress.progress(10, "tokenising") as advance:
            advance(10)
        assert "10/10" in capsys.readouterr().err
