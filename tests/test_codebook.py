"""Codebook usage, collapse warnings and fit reports; codebooks on disk, ours and the official one."""

import hashlib
import json
import os
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datafakes import Trap, description, fit_on, flip, no_space, random_rows
from safetensors.torch import save_file

from mapet.data import cache_writer
from mapet.data.cache import TokenCache
from mapet.data.sources import open_source
from mapet.errors import DataError
from mapet.tokenizers import load_tokenizer, make_tokenizer
from mapet.tokenizers.foreign.official_codebook import read_official_codebook
from mapet.tokenizers.pixel import PixelTokenizer
from mapet.tokenizers.store import read_provenance
from mapet.tokenizers.usage import CodebookUsage, CollapseWarning, count_usage, warn_of_collapse


def noise_images(count: int = 40, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def fitted(vocabulary: int = 8) -> PixelTokenizer:
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=vocabulary)
    fit_on(tokenizer, noise_images(), iterations=3, redos=2)
    return tokenizer


def test_usage_of_equally_used_entries() -> None:
    usage = CodebookUsage(np.full(8, 8))
    assert usage.perplexity == pytest.approx(8)
    assert usage.largest_share == 1 / 8
    assert len(usage.dead) == 0
    assert usage.collapse() == ()


def test_perplexity_is_two_to_the_entropy_in_bits() -> None:
    usage = CodebookUsage(np.array([4, 2, 1, 1, 0]))
    assert usage.perplexity == pytest.approx(2**1.75)
    assert usage.dead.tolist() == [4]
    assert usage.total == 8


def test_usage_of_a_cache_counts_large_ids(tmp_path: Path) -> None:
    tokens = torch.tensor([[65535, 40000, 0, 0]])
    made = description(vocabulary=65536)
    cache_writer.write_cache(tmp_path / "cache", made, random_rows(1)[0], tokens, ["a"])
    usage = count_usage(TokenCache.open(tmp_path / "cache"))
    assert (usage.total, usage.dead.size, usage.counts[0], usage.counts[65535]) == (4, 65533, 2, 1)


COLLAPSED = {
    "90 of 100 entries are never used": CodebookUsage(np.array([5] * 10 + [0] * 90)),
    "20 of 100 entries repeat another": CodebookUsage(np.full(100, 5), repeated=20),
    r"perplexity is 1\.\d with 100 entries": CodebookUsage(np.array([10_000] + [1] * 99)),
    "entry 3 takes 60% of all tokens": CodebookUsage(np.array([10, 10, 10, 60, 10])),
}


@pytest.mark.parametrize("reason", COLLAPSED)
def test_a_collapsed_codebook_warns_loudly(reason: str) -> None:
    with pytest.warns(CollapseWarning, match=f"COLLAPSED: .*{reason}"):
        warn_of_collapse(COLLAPSED[reason], "pixel")


def test_a_healthy_codebook_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_collapse(CodebookUsage(np.array([40, 20, 20, 10, 5, 5])), "pixel")


def test_fitting_equal_images_warns_and_says_so_in_the_report() -> None:
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
    with pytest.warns(CollapseWarning, match="the codebook of tokenizer pixel has COLLAPSED"):
        report = fit_on(tokenizer, torch.full((20, 3, 16, 16), 90, dtype=torch.uint8), iterations=2, redos=1)
    assert "COLLAPSED: 7 of 8 entries are never used" in report.summary()


def test_the_report_describes_the_fit() -> None:
    report = fitted().report
    assert (report.images, report.patches, report.rows, report.features) == (40, 640, 640, 48)
    assert [len(curve) for curve in report.objectives] == [3, 3]
    assert report.objective == min(curve[-1] for curve in report.objectives)
    assert report.usage.total == 640
    text = report.summary()
    assert "8 entries of 48 numbers, from 640 of 640 patches of 40 images" in text
    assert f"perplexity {report.usage.perplexity:.1f} of 8, 0 dead, 0 repeated" in text


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    tokenizer = fitted()
    tokenizer.save(tmp_path / "a" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "a" / "tokenizer")
    images = noise_images(seed=1)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.report.summary() == tokenizer.report.summary()
    assert loaded.codebook_source == tokenizer.codebook_source
    assert sorted(os.listdir(tmp_path / "a" / "tokenizer")) == ["codebook.safetensors", "tokenizer.json"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    fitted(8).save(tmp_path)
    fitted(9).save(tmp_path)
    assert load_tokenizer(tmp_path).vocabulary == 9


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_a_failed_save_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    fitted(8).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    monkeypatch.setattr(os, "fsync" if failing == "write" else "replace", no_space)
    with pytest.raises(DataError, match=r"cannot save the tokenizer in .*: No space left on device"):
        fitted(9).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_crash_between_the_two_files_is_noticed(tmp_path: Path) -> None:
    fitted(8).save(tmp_path / "old")
    fitted(9).save(tmp_path / "new")
    os.replace(tmp_path / "new" / "codebook.safetensors", tmp_path / "old" / "codebook.safetensors")
    with pytest.raises(DataError, match=r"codebook.safetensors is damaged, or not the one of tokenizer\.json"):
        load_tokenizer(tmp_path / "old")


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "DROP"}))


SETTINGS = {"image_size": 16, "patch_size": 4, "vocabulary": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, this version of mapet reads 1"),
        ({"name": "vqkd"}, "unknown tokenizer 'vqkd'; known are pixel, kclip"),
        ({"grid": "DROP"}, r"tokenizer\.json: its content lacks grid"),
        ({"extra": 1}, "has an unknown entry 'extra'"),
        (
            {"settings": {"image_size": 16, "patch_size": 4, "vocabulary": 9}},
            r"codebook is \(8, 48\), must be \(9, 48\)",
        ),
        (
            {"settings": {"image_size": 16, "patch_size": 4, "vocabulary": 8, "colour": 9}},
            "has settings pixel does not take: .*colour",
        ),
        ({"settings": {"image_size": 32, "patch_size": 4, "vocabulary": 8}}, "the fingerprints differ"),
        ({"codebook_sha256": "0" * 64}, r"codebook\.safetensors is damaged"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    fitted().save(tmp_path)
    edit_manifest(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_damaged_codebook_is_refused(tmp_path: Path) -> None:
    fitted().save(tmp_path)
    flip(tmp_path / "codebook.safetensors")
    with pytest.raises(DataError, match=r"codebook\.safetensors is damaged"):
        load_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer: there is no tokenizer\.json"):
        load_tokenizer(tmp_path)
    fitted().save(tmp_path)
    (tmp_path / "codebook.safetensors").unlink()
    with pytest.raises(DataError, match=r"cannot read .*codebook\.safetensors"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    fitted().save(tmp_path)
    edit_manifest(tmp_path, name="kclip")
    with pytest.raises(DataError, match="holds a tokenizer kclip, not pixel"):
        PixelTokenizer.load(tmp_path)


def test_a_codebook_of_nan_is_refused() -> None:
    with pytest.raises(DataError, match="here is a codebook with NaN or infinity"):
        fitted().set_codebook(torch.full((8, 48), float("nan")), "here")


def test_other_tensors_in_place_of_a_codebook_are_refused(tmp_path: Path) -> None:
    fitted().save(tmp_path)
    path = tmp_path / "codebook.safetensors"
    save_file({"other": torch.zeros(1)}, path)
    edit_manifest(tmp_path, codebook_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match=r"codebook\.safetensors: it lacks codebook"):
        load_tokenizer(tmp_path)


def test_the_fingerprint_follows_settings_and_codebook() -> None:
    first, again = fitted(), fitted()
    assert first.fingerprint() == again.fingerprint()
    again.set_codebook(first.codebook.flip(0), "flipped")
    wider = make_tokenizer("pixel", image_size=32, patch_size=4, vocabulary=8)
    wider.set_codebook(first.codebook, "taken over")
    assert len({first.fingerprint(), again.fingerprint(), wider.fingerprint()}) == 3


def test_official_codebook_is_read(tmp_path: Path) -> None:
    centroids = np.random.default_rng(0).random((8, 48), dtype=np.float32)
    np.save(tmp_path / "codebook_centroids_4194304_8192.npy", centroids)
    path = tmp_path / "codebook_centroids_4194304_8192.npy"
    assert np.array_equal(read_official_codebook(path).numpy(), centroids)
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8, codebook=path)
    assert np.array_equal(tokenizer.codebook.numpy(), centroids)
    assert tokenizer.codebook_source == str(path)
    assert tokenizer.report is None
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").report is None


def test_official_codebook_of_another_size_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.zeros((9, 48), dtype=np.float32))
    with pytest.raises(DataError, match=r"c\.npy is a codebook of shape \(9, 48\), tokenizer pixel needs \(8, 48\)"):
        make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8, codebook=tmp_path / "c.npy")


FLAT_INDEX = struct.Struct("<4siqqq?iQ")


def test_an_index_is_read_without_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    path = tmp_path / "codebook_index_4194304_8192.npy"
    centroids = np.random.default_rng(0).random((8, 48), dtype=np.float32)
    path.write_bytes(FLAT_INDEX.pack(b"IxF2", 48, 8, 1 << 20, 1 << 20, True, 1, 8 * 48) + centroids.tobytes())
    assert np.array_equal(read_official_codebook(path).numpy(), centroids)


@pytest.mark.parametrize(
    ("features", "entries", "metric", "numbers"),
    [(48, 8, 1, 2**61), (48, 2**40, 1, 48 * 2**40), (-48, -8, 1, 384), (48, 8, 0, 384), (0, 0, 1, 0), (48, 9, 1, 384)],
)
def test_an_index_whose_header_does_not_fit_is_refused(tmp_path: Path, features, entries, metric, numbers) -> None:
    path = tmp_path / "index.npy"
    header = FLAT_INDEX.pack(b"IxF2", features, entries, 1 << 20, 1 << 20, True, metric, numbers)
    for content in (header + bytes(8 * 48 * 4), header[:20]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"index\.npy: it is a damaged index of the faiss library"):
            read_official_codebook(path)


def test_a_pickle_named_npy_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / "sprung")
    np.save(tmp_path / "trap.npy", trap, allow_pickle=True)
    with pytest.raises(DataError, match=r"cannot read the codebook .*trap\.npy"):
        read_official_codebook(tmp_path / "trap.npy")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((8, 48)), r"must hold float32 centroids \(entries, features\), it holds float64 \(8, 48\)"),
        (np.zeros(48, dtype=np.float32), r"it holds float32 \(48,\)"),
        (b"\x93NUMPY\x01\x00", "cannot read the codebook"),
        (b"", "cannot read the codebook"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, content: np.ndarray | bytes, message: str) -> None:
    path = tmp_path / "c.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(DataError, match=message):
        read_official_codebook(path)


def test_an_index_that_faiss_wrote_is_read(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    path = tmp_path / "codebook_index_4096_8.npy"
    codebook = torch.randn(8, 48)
    index = faiss.IndexFlatL2(48)
    index.add(codebook.numpy())
    faiss.write_index(index, str(path))
    assert torch.equal(read_official_codebook(path), codebook)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"index_4096_8\.npy: it is a damaged index of the faiss library"):
        read_official_codebook(path)
    path.write_bytes(b"IxFI" + whole[4:])
    with pytest.raises(DataError, match="of kind IxFI; only IndexFlatL2 holds a codebook"):
        read_official_codebook(path)


def test_a_fit_by_faiss_is_used_as_it_is(tmp_path: Path) -> None:
    """Ids are those of IndexFlatL2.search, and the float64 argmin where that one is lost in fp32 rounding."""
    faiss = pytest.importorskip("faiss")
    source = open_source("digits")
    tokenizer = make_tokenizer("pixel", image_size=8, patch_size=4, vocabulary=64)
    images = torch.stack([tokenizer.prepare(source.load(i)) for i in range(len(source))])
    rows = tokenizer.features(images).flatten(0, 1)
    fitted = faiss.Kmeans(48, 64, niter=10, nredo=2, seed=1234)
    fitted.train(rows.numpy())
    faiss.write_index(fitted.index, str(tmp_path / "codebook_index_64.npy"))
    theirs = torch.from_numpy(fitted.index.search(rows.numpy(), 1)[1][:, 0])
    tokenizer = make_tokenizer(
        "pixel", image_size=8, patch_size=4, vocabulary=64, codebook=tmp_path / "codebook_index_64.npy"
    )
    ours = tokenizer.encode(images).flatten()
    exact = torch.stack([(rows.double() - entry.double()).square().sum(1) for entry in tokenizer.codebook], dim=1)
    two = exact.topk(2, dim=1, largest=False).values
    rounding = 64 * 2.0**-24 * rows.double().square().sum(1)
    tied = two[:, 1] - two[:, 0] <= rounding
    assert torch.equal(ours, exact.argmin(1))
    assert torch.equal(ours[~tied], theirs[~tied])
    assert tied.float().mean() < 0.01


def test_the_codebook_file_says_where_it_comes_from(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
    report = fit_on(
        tokenizer, noise_images(), seed=7, iterations=3, redos=2, init="k-means++", tolerance=0.1, source="5e" * 32
    )
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    said = read_provenance(tmp_path / "codebook.safetensors")
    assert (said["name"], said["settings"]) == ("pixel", tokenizer.settings())
    assert said["fingerprint"] == tokenizer.fingerprint()
    assert said["versions"]["torch"] == torch.__version__
    fit = said["fit"]
    assert {name: fit[name] for name in ("seed", "init", "iterations", "tolerance", "source")} == {
        "seed": 7, "init": "k-means++", "iterations": 3, "tolerance": 0.1, "source": "5e" * 32,
    }  # fmt: skip
    assert (fit["images"], fit["patches"], fit["rows"], fit["max_rows"]) == (40, 640, 640, 4096)
    assert fit["objectives"] == [list(curve) for curve in report.objectives]
    assert len(fit["objectives"]) == 2


def test_a_file_without_provenance(tmp_path: Path) -> None:
    save_file({"codebook": torch.zeros(2, 2)}, tmp_path / "plain.safetensors")
    with pytest.raises(DataError, match=r"plain\.safetensors is no codebook with its provenance"):
        read_provenance(tmp_path / "plain.safetensors")
