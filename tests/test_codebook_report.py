"""The codebook report: counts over all tokens, ties between entries and classes, and what the folder holds."""

from __future__ import annotations

import csv
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import FIT, SIZES, everything_in, pictures
from datafakes import description
from PIL import Image

from mapet.cli import main
from mapet.data import cache_writer
from mapet.data.cache import TokenCache
from mapet.report import gallery
from mapet.report.codebook import CodebookStatistics, write_codebook_report
from mapet.tokenizers import load_tokenizer
from mapet.tokenizers.usage import class_counts, measure_usage, pointwise_mutual_information, repeated_entries

CLASSES = ["cat", "dog", "eel"]


@pytest.fixture
def cache(tmp_path) -> TokenCache:
    """30 images of 2 x 2 patches, 10 a class: entry 0 everywhere, 1 in cats, 2 in dogs, 3 mostly in dogs, 9 once."""
    labels = np.repeat(np.arange(3), 10)
    tokens = torch.zeros(30, 4, dtype=torch.int64)
    tokens[:10, 1] = 1
    tokens[10:20, 1:3] = 2
    tokens[14:25, 3] = 3
    tokens[29, 3] = 9
    images = (tokens * 20).to(torch.uint8).view(30, 1, 2, 2).expand(-1, 3, -1, -1)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    names = [f"{i}.png" for i in range(30)]
    cache_writer.write_cache(tmp_path / "made", description(vocabulary=12), images, tokens, names, labels, CLASSES)
    return TokenCache.open(tmp_path / "made")


@pytest.fixture(scope="module")
def command_cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    images = pictures(folder / "images")
    assert main([*map(str, ("tokenize", "--images", images, "--output", folder / "cache", *SIZES, *FIT))]) == 0
    return folder / "cache"


def test_counts_by_class():
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 7, (40_000, 3)).astype(np.uint16), rng.integers(0, 4, 40_000)
    counts = class_counts(tokens, labels, 7, 4)
    for label in range(4):
        assert counts[label].tolist() == np.bincount(tokens[labels == label].ravel(), minlength=7).tolist()


def test_pointwise_mutual_information_is_its_formula():
    counts = np.array([[30, 10, 0, 1], [10, 30, 5, 0]])
    found = pointwise_mutual_information(counts)
    assert found[0, 0] == pytest.approx(math.log2(30 * 86 / (40 * 41)))
    assert found[1, 2] == pytest.approx(math.log2(5 * 86 / (5 * 45))), "an entry of one class only"
    assert found[0, 2] == -math.inf
    floored = pointwise_mutual_information(counts, floor=6)
    assert floored[1, 2] == floored[0, 3] == -math.inf and floored[0, 0] == found[0, 0]
    assert pointwise_mutual_information(np.full((3, 5), 7)) == pytest.approx(0), "chance"


def test_repeated_entries_name_the_first():
    codebook = torch.tensor([[1.0, 2], [3, 4], [1, 2], [1, 2], [0, 0], [3, 4]])
    assert repeated_entries(codebook) == {2: 0, 3: 0, 5: 1}
    assert len(repeated_entries(codebook)) == measure_usage(torch.arange(6), 6, codebook).repeated
    assert repeated_entries(torch.eye(3)) == {}


def test_ties_are_the_strongest_first_and_above_chance(cache):
    found = CodebookStatistics(cache, floor=5)
    assert [tie.entry for tie in found.ties(0, 5)] == [1, 0]
    assert [tie.entry for tie in found.ties(1, 5)] == [2, 3], "entry 0 is rarer among dogs than elsewhere"
    dogs = found.ties(1, 5)
    assert (dogs[0].tokens, dogs[0].part, dogs[1].tokens, dogs[1].part) == (20, 1.0, 6, 6 / 11)
    assert dogs[0].information == pytest.approx(math.log2(3))
    assert [tie.entry for tie in found.ties(2, 5)] == [3, 0], "entry 9 is in eels only, but once"
    assert [tie.entry for tie in CodebookStatistics(cache, floor=1).ties(2, 1)] == [9]


def test_places_are_those_of_the_entry_and_the_class(cache):
    assert CodebookStatistics(cache).places(3, 2).tolist() == [[image, 3] for image in range(20, 25)]


def test_the_folder(cache, tmp_path):
    codebook = torch.rand(12, 5, generator=torch.Generator().manual_seed(0))
    codebook[11] = codebook[3]
    path = write_codebook_report(
        cache, tmp_path / "r", codebook=codebook, chosen=[3, 8], rows=3, floor=5, command="mapet x"
    )
    names = ["chosen.png", "classes.csv", "classes.png", "least_used.png", "most_used.png"]
    assert sorted(everything_in(tmp_path / "r")) == [*names, "report.md", "usage.csv", "usage.png"]
    report = path.read_text()
    assert sorted(re.findall(r"\]\((\w+\.png)\)", report)) == sorted(
        n for n in everything_in(tmp_path / "r") if ".png" in n
    )
    facts = dict(re.findall(r"^\| (.+?) \| (.+) \|$", report, re.M))
    assert facts["entries"] == "12, of which 5 are used"
    assert facts["dead entries, never used"] == "7: 4, 5, 6, 7, 8, 10, 11"
    assert facts["entries that repeat an earlier one"] == "1: 11 (as 3)"
    assert facts["perplexity"].startswith(f"{CodebookStatistics(cache).usage.perplexity:.1f} (")
    assert "7 of 12 entries are never used" in facts["collapsed"]
    assert "Made by `mapet x`" in report and "Chosen, but never used: 8." in report
    assert "| dog | 2: 1.58 bits, 20 tokens (100%) |" in report
    usage = list(csv.DictReader((tmp_path / "r/usage.csv").open()))
    assert [int(row["tokens"]) for row in usage] == np.bincount(cache.token_array.ravel(), minlength=12).tolist()
    assert usage[11]["repeats"] == "3" and usage[3]["repeats"] == ""
    classes = list(csv.DictReader((tmp_path / "r/classes.csv").open()))
    assert [(row["class"], row["entry"]) for row in classes[:3]] == [("cat", "1"), ("cat", "0"), ("dog", "2")]


def average_of_row(picture: Path, row: int) -> int:
    """Grey value of the average patch."""
    top = gallery.HEADER + row * (gallery.CELL + gallery.GAP) + gallery.CELL // 2
    return int(np.asarray(Image.open(picture).convert("L"))[top, gallery.LABEL + gallery.CELL // 2])


def test_the_pictures_show_the_right_entries(cache, tmp_path):
    """The grey of a patch is 20 times its token."""
    write_codebook_report(cache, tmp_path / "report", chosen=[3, 1], rows=2, floor=5)
    drawn = {
        name: [average_of_row(tmp_path / f"report/{name}.png", row) // 20 for row in range(2)]
        for name in ("most_used", "least_used", "chosen", "classes")
    }
    assert drawn == {"most_used": [0, 2], "least_used": [9, 1], "chosen": [3, 1], "classes": [1, 2]}


def test_an_unlabelled_cache(tmp_path):
    images, tokens = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(16).view(4, 4)
    cache_writer.write_cache(tmp_path / "made", description(), images, tokens, list("abcd"))
    path = write_codebook_report(TokenCache.open(tmp_path / "made"), tmp_path / "r")
    assert "have no labels" in path.read_text() and "not known: the codebook was not given" in path.read_text()
    assert not list((tmp_path / "r").glob("classes*")) and not (tmp_path / "r/chosen.png").exists()


class TestCommand:
    def test_it_finds_the_codebook_beside_the_cache(self, mapet, command_cache, tmp_path):
        outcome = mapet.succeed("codebook", "--cache", command_cache, "--output", tmp_path / "r", "--entries", 3, 5)
        assert f"{tmp_path}/r/report.md: 40 images, 16 entries" in outcome.out
        report = (tmp_path / "r/report.md").read_text()
        assert "| entries that repeat an earlier one | 0 |" in report and "| bars | " in report
        for name in ("usage", "most_used", "least_used", "chosen", "classes"):
            with Image.open(tmp_path / f"r/{name}.png") as picture:
                assert min(picture.size) > 200 and np.asarray(picture.convert("L")).std() > 10

    def test_another_tokenizer_is_refused_when_given_and_left_aside_when_found(self, mapet, command_cache, tmp_path):
        other = load_tokenizer(command_cache.with_name("cache_tokenizer"))
        other.set_codebook(other.codebook.flip(0), "flipped")
        other.save(tmp_path / "other")
        given = ("codebook", "--cache", command_cache, "--output", tmp_path / "r")
        mapet.fail(*given, "--codebook", tmp_path / "other", code=1, names=(tmp_path / "other", "fingerprints differ"))
        assert not (tmp_path / "r").exists()
        shutil.copytree(command_cache, tmp_path / "c")
        other.save(tmp_path / "c_tokenizer")
        mapet.succeed("codebook", "--cache", tmp_path / "c", "--output", tmp_path / "r")
        assert "not known: the codebook was not given" in (tmp_path / "r/report.md").read_text()

    @pytest.mark.parametrize(
        ("option", "names"),
        [
            (("--entries", 16, 3), ("entries 16", "0 to 15")),
            (("--rows", 0), ("--rows", "at least 1")),
            (("--floor", 0), ("floor",)),
        ],
    )
    def test_bad_options(self, mapet, command_cache, tmp_path, option, names):
        mapet.fail("codebook", "--cache", command_cache, "--output", tmp_path / "r", *option, code=2, names=names)
        assert not (tmp_path / "r").exists()

    def test_no_cache(self, mapet, tmp_path):
        mapet.fail("codebook", "--cache", tmp_path, code=1, names=(tmp_path, "no token cache"))
