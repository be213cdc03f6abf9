"""`mapet tokenize --fit`: its options and log, and a fit that is killed and goes on."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SIZES, pictures
from datafakes import NoiseSource
from forked import killed_at_sync

from mapet.errors import DataError
from mapet.tokenizers import make_tokenizer
from mapet.tokenizers.fitting import fit
from mapet.tokenizers.pixel import PixelTokenizer
from mapet_kernels import kmeans

SCRIPT = Path(__file__).parent / "fit_script.py"
FEATURES = {"plan.json", "part_00000.json", "features_00000.npy", "features.json"}
FIT = ("--workers", 0, "--batch-size", 16, "--fit", "--fit-redos", 2, "--fit-iterations", 4)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture
def stop(monkeypatch):
    """stop(n): the k-means is interrupted after n iterations; stop(0): it is not."""

    def interrupt(iterations: int) -> None:
        done = []

        def lines(config):
            def tell(iteration: kmeans.Iteration) -> None:
                done.append(iteration)
                if len(done) == iterations:
                    raise KeyboardInterrupt

            return tell

        monkeypatch.setattr(fit, "iteration_lines", lines)

    return interrupt


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fit_saves_a_tokenizer_and_makes_no_cache(mapet, images, tmp_path):
    options = ("--fit-init", "k-means++", "--fit-tolerance", 0.02, "--fit-patches", 10)
    outcome = mapet.succeed("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT, *options)
    assert "saved in" in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["cache_tokenizer"]
    assert set(files_in(tmp_path / "cache_tokenizer")) == {"codebook.safetensors", "tokenizer.json"}
    fit = json.loads((tmp_path / "cache_tokenizer" / "tokenizer.json").read_text())["fit"]
    assert (fit["init"], fit["tolerance"], fit["rows"], fit["max_rows"]) == ("k-means++", 0.02, 160, 160)
    assert (len(fit["objectives"]), len(fit["source"])) == (2, 64)
    again = mapet.succeed("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
    assert "using the tokenizer pixel" in again.out


def test_every_slow_iteration_is_told_with_the_time_left(mapet, images, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "SECONDS_BETWEEN_ITERATIONS", 0)
    outcome = mapet.succeed("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
    lines = [line for line in outcome.err.splitlines() if line.startswith("k-means: ")]
    pattern = r"k-means: start (\d)/2, iteration (\d)/4, objective ([\d.e+]+), \d+ splits, \d+\.\d s, ETA \d:\d\d:\d\d"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [(int(line[1]), int(line[2])) for line in found] == [(s, i) for s in (1, 2) for i in (1, 2, 3, 4)]
    fitted = json.loads((tmp_path / "cache_tokenizer" / "tokenizer.json").read_text())["fit"]
    assert [line[3] for line in found] == [f"{value:.6g}" for curve in fitted["objectives"] for value in curve]


@pytest.mark.parametrize("place", ["t/fit", "features"])
def test_a_stopped_fit_goes_on_without_reading_the_images_again(place, mapet, images, tmp_path, stop, monkeypatch):
    kept = place == "features"
    arguments = ("tokenize", "--images", images, *SIZES, *FIT, "--fit-save-every", 1e-6, "--output", tmp_path / "cache")
    mapet.succeed(*arguments, "--codebook", tmp_path / "whole")
    arguments += ("--features-dir", tmp_path / place) if kept else ()
    stop(5)
    stopped = mapet(*arguments, "--codebook", tmp_path / "t")
    assert stopped.code == 130
    assert f"the same command goes on with the fit in {tmp_path / place}" in stopped.err
    assert set(files_in(tmp_path / place)) == {*FEATURES, "kmeans"}
    stop(0)
    monkeypatch.setattr(PixelTokenizer, "features", lambda self, images: pytest.fail("the images are read again"))
    mapet.succeed(*arguments, "--codebook", tmp_path / "t")
    assert files_in(tmp_path / "t") == files_in(tmp_path / "whole")
    assert set(files_in(tmp_path / place)) == (FEATURES if kept else set())


def test_an_unfinished_fit_of_other_settings_is_refused_or_replaced(mapet, images, tmp_path, stop):
    arguments = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
    stop(3)
    assert mapet(*arguments, "--fit-save-every", 1e-6).code == 130
    stop(0)
    place, before = tmp_path / "cache_tokenizer/fit", files_in(tmp_path)
    for changes, code, names in (
        (("--seed", 5), 1, (place, "seed is 1234, wanted 5", "delete that folder")),
        (("--fit-iterations", 6), 2, (place / "kmeans", "belongs to another fit", "iterations")),
    ):
        mapet.fail(*arguments, *changes, code=code, names=names)
        assert files_in(tmp_path) == before
    mapet.succeed(*arguments, "--seed", 5, "--fit-iterations", 6, "--overwrite")
    assert set(files_in(tmp_path / "cache_tokenizer")) == {"codebook.safetensors", "tokenizer.json"}


def test_an_unfinished_fit_of_earlier_versions_is_refused_by_name(mapet, images, tmp_path):
    (tmp_path / "cache_tokenizer/fit").mkdir(parents=True)
    (tmp_path / "cache_tokenizer/fit/sample.json").write_text("{}")
    arguments = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
    names = (tmp_path / "cache_tokenizer/fit", "an unfinished fit of an earlier version", "delete that folder")
    mapet.fail(*arguments, code=1, names=names)
    assert set(files_in(tmp_path)) == {"cache_tokenizer/fit/sample.json"}


def test_a_damaged_sample_is_made_again(mapet, images, tmp_path, stop):
    arguments = ("tokenize", "--images", images, *SIZES, *FIT)
    mapet.succeed(*arguments, "--output", tmp_path / "whole")
    stop(3)
    assert mapet(*arguments, "--output", tmp_path / "cache", "--fit-save-every", 1e-6).code == 130
    stop(0)
    sample = tmp_path / "cache_tokenizer/fit/features_00000.npy"
    sample.write_bytes(sample.read_bytes()[:-1])
    told = mapet.succeed(*arguments, "--output", tmp_path / "cache").err
    assert "features_00000.npy is not as it was written" in told
    assert files_in(tmp_path / "cache_tokenizer") == files_in(tmp_path / "whole_tokenizer")


def test_without_saves_the_k_means_begins_anew(mapet, images, tmp_path, stop):
    stop(3)
    arguments = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT, "--fit-save-every", 0)
    assert mapet(*arguments).code == 130
    assert set(files_in(tmp_path)) == {f"cache_tokenizer/fit/{name}" for name in FEATURES}


def test_every_moment_of_a_kill(tmp_path):
    """Sampling, k-means and saving: the next call makes the same codebook and leaves nothing else."""
    config = fit.FitConfig(iterations=2, redos=1, save_every=1e-9)

    def make(folder: Path) -> None:
        tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
        fit.fit_tokenizer(tokenizer, NoiseSource(12), folder, config, workers=0)

    make(tmp_path / "whole")
    whole, kills = files_in(tmp_path / "whole"), 0
    for sync in range(1, 40):
        folder = tmp_path / str(sync)
        if not killed_at_sync(lambda folder=folder: make(folder), sync):
            break
        kills += 1
        make(folder)
        assert files_in(folder) == whole, f"after a kill at sync {sync}"
    assert kills > 8 and set(whole) == {"codebook.safetensors", "tokenizer.json"}


def test_features_that_go_are_not_many_more_than_are_used(tmp_path, monkeypatch):
    made, sample = [], fit.sample_features
    monkeypatch.setattr(fit, "sample_features", lambda *a, **k: made.append(sample(*a, **k)) or made[-1])
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
    for features in (None, tmp_path / "features"):
        config = fit.FitConfig(patches=10, iterations=1, redos=1, features=features)
        fit.fit_tokenizer(tokenizer, NoiseSource(40), tmp_path / "t", config, workers=0)
        assert tokenizer.report.rows == 80
    assert [found.rows for found in made] == [160, 640]


def test_too_few_patches(tmp_path):
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=64)
    with pytest.raises(DataError, match="2 images have 32 patches, too few for a vocabulary of 64"):
        fit.fit_tokenizer(tokenizer, NoiseSource(2), tmp_path / "t", fit.FitConfig(), workers=0)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--fit-redos", 0), ("redos must be at least 1, got 0",)),
        (("--fit-tolerance", 1), ("tolerance must be in [0, 1)",)),
        (("--fit-patches", 0), ("--fit-patches must be at least 1, got 0",)),
    ],
)
def test_settings_out_of_range_are_refused_before_the_images_are_read(
    mapet, images, tmp_path, options, names, monkeypatch
):
    monkeypatch.setattr(PixelTokenizer, "features", lambda self, images: pytest.fail("the images are read"))
    arguments = ("tokenize", "--images", images, "--output", tmp_path / "cache", *SIZES, *FIT)
    mapet.fail(*arguments, *options, code=2, names=names)
    assert list(tmp_path.iterdir()) == []


def test_fit_needs_images(mapet, tmp_path):
    arguments = ("tokenize", "--fit", "--import-tokens", "t.pth", "--csv", "c.csv", "--root", tmp_path)
    mapet.fail(*arguments, code=2, names=("--fit can only be given with --images",))


def test_fit_needs_a_place_for_the_codebook(mapet, images):
    names = ("--fit makes a codebook, and --codebook c.npy is one",)
    mapet.fail("tokenize", "--images", images, "--fit", "--codebook", "c.npy", code=2, names=names)


def test_kill_9_in_mid_fit_and_on_to_the_same_codebook(mapet, images, tmp_path):
    arguments = ("tokenize", "--images", images, *SIZES, *FIT, "--fit-save-every", 1e-6, "--fit-iterations", 8)
    folder = tmp_path / "killed_tokenizer"
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, (*arguments, "--output", tmp_path / "killed"))])
    try:
        deadline = time.monotonic() + 60
        while not (folder / "fit/kmeans").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert set(files_in(folder / "fit")) >= {*FEATURES, "kmeans"}
    assert not (folder / "tokenizer.json").exists()
    for name in ("killed", "whole"):
        mapet.succeed(*arguments, "--output", tmp_path / name)
    assert files_in(folder) == files_in(tmp_path / "whole_tokenizer")
