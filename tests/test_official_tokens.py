"""Import of the official token files: order, counts, range and safety."""

import csv
import os
import pickle

import numpy as np
import pytest
import torch
from datafakes import Trap
from PIL import Image

from mapet.data.cache import TokenCache
from mapet.data.decode import centre_square, decode
from mapet.errors import ConfigError, DataError
from mapet.tokenizers.foreign.official_tokens import import_official, ordered_token_files

IMAGES = 10
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.fixture
def layout(tmp_path):
    """Images in class folders, their CSV, and three shards as the official extraction writes them."""
    rows = []
    for index in range(IMAGES):
        name = f"n{index % 3}/n{index % 3}_{index}.JPEG"
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "root" / name, format="JPEG")
        rows.append((name, index % 3))
    write_csv(tmp_path, rows)
    tokens = torch.randint(0, 8192, (IMAGES, 16), generator=torch.Generator().manual_seed(0))
    (tmp_path / "shards").mkdir()
    parts = {0: tokens[:1], 500: tokens[1:6], 1000000: tokens[6:]}
    for number, part in reversed(parts.items()):  # so that the oldest file is the last one
        torch.save(part.int(), shard(tmp_path, number))
    return tmp_path, tokens


def write_csv(folder, rows, header=("path", "class")):
    with open(folder / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def shard(folder, number):
    return folder / f"shards/k_means_processed_ade8192_index_{number}_bsize_16.pth"


def run(folder, **changes):
    options = {"token_files": folder / "shards", "csv_file": folder / "train.csv", "root": folder / "root"}
    fixed = {"output": folder / "cache", "image_size": 16, "workers": 0}
    return import_official(**{**options, **fixed, **changes})


class TestImport:
    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
    def test_rows_meet_their_images(self, layout, dtype):
        folder, tokens = layout
        torch.save(tokens.to(dtype), folder / "all.pth")
        report = run(folder, token_files=folder / "all.pth", tokenizer="vqkd")
        cache = TokenCache.open(folder / "cache")
        assert report.images == len(cache) == IMAGES and (cache.grid, cache.vocabulary) == (4, 8192)
        assert cache.tokenizer == "vqkd" and cache.classes == ["0", "1", "2"]
        assert torch.equal(cache.tokens(range(IMAGES)), tokens)
        assert cache.labels.tolist() == [index % 3 for index in range(IMAGES)]
        for index in (0, 7):
            image = Image.open(folder / "root" / cache.names[index])
            assert np.array_equal(cache.images([index])[0].numpy(), centre_square(image, 16))

    def test_shards_of_a_folder_are_taken_by_number_not_by_time(self, layout):
        folder, tokens = layout
        for age, number in enumerate((1000000, 500, 0)):
            os.utime(shard(folder, number), (1000 + age, 1000 + age))
        run(folder, workers=2)
        assert torch.equal(TokenCache.open(folder / "cache").tokens(range(IMAGES)), tokens)

    def test_the_callers_order_is_kept(self, layout):
        folder, tokens = layout
        run(folder, token_files=[shard(folder, number) for number in (500, 0, 1000000)])
        expected = torch.cat([tokens[1:6], tokens[:1], tokens[6:]])
        assert torch.equal(TokenCache.open(folder / "cache").tokens(range(IMAGES)), expected)

    def test_images_are_read_without_exif_orientation(self, layout):
        folder, _ = layout
        exif = Image.Exif()
        exif[0x0112] = 6
        path = folder / "root/n0/n0_0.JPEG"
        image = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8) * 10, (20, 1)))
        image.save(path, exif=exif)
        run(folder)
        expected = centre_square(Image.open(path).convert("RGB"), 16)
        assert np.array_equal(TokenCache.open(folder / "cache").images([0])[0].numpy(), expected)

    @pytest.mark.parametrize("kind", ["alpha", "16 bit"])
    def test_images_are_read_as_pillow_converts_them(self, layout, kind):
        """As the official code does, and not as everywhere else: no white behind alpha, 16-bit grey is clipped."""
        folder, _ = layout
        rng = np.random.default_rng(0)
        if kind == "alpha":
            image = Image.fromarray(rng.integers(0, 256, (20, 20, 4), dtype=np.uint8))
        else:
            image = Image.fromarray(rng.integers(0, 2**16, (20, 20), dtype=np.uint16))
        path = folder / "root/n0/n0_0.JPEG"
        image.save(path, format="PNG")
        run(folder)
        stored = TokenCache.open(folder / "cache").images([0])[0].numpy()
        assert np.array_equal(stored, centre_square(image.convert("RGB"), 16))
        assert np.abs(stored.astype(int) - centre_square(decode(path), 16)).max() > 50

    @pytest.mark.parametrize(
        ("name", "label"),
        [("k_means_processed_ade_0", "kclip"), ("VQKD_train_0", "vqkd"), ("dall-e_0", "dalle"), ("tokens", "official")],
    )
    def test_the_cache_names_the_tokenizer_that_the_files_name(self, layout, name, label):
        folder, tokens = layout
        torch.save(tokens.int(), folder / f"{name}.pth")
        run(folder, token_files=folder / f"{name}.pth")
        assert TokenCache.open(folder / "cache").tokenizer == label

    def test_a_bad_image_takes_its_tokens_with_it(self, layout):
        folder, tokens = layout
        (folder / "root/n1/n1_4.JPEG").unlink()
        with pytest.raises(DataError, match=r"n1_4\.JPEG: No such file"):
            run(folder)
        report = run(folder, max_skipped=0.1)
        kept = [index for index in range(IMAGES) if index != 4]
        assert report.images == 9 and report.skipped[0].name == "n1/n1_4.JPEG"
        assert torch.equal(TokenCache.open(folder / "cache").tokens(range(9)), tokens[kept])

    def test_class_names(self, layout):
        folder, _ = layout
        np.save(folder / "classes.npy", np.array(["n0", "n1", "n2", "n3"]))
        run(folder, class_names=folder / "classes.npy")
        assert TokenCache.open(folder / "cache").classes == ["n0", "n1", "n2", "n3"]

    def test_the_same_import_is_reused_and_another_refused(self, layout):
        folder, tokens = layout
        run(folder)
        assert run(folder).reused
        torch.save((tokens[:1] + 1).int() % 8192, shard(folder, 0))
        with pytest.raises(DataError, match="tokenizer_fingerprint is"):
            run(folder)

    def test_an_absolute_path_inside_the_root_is_fine(self, layout):
        folder, _ = layout
        rows = [(str(folder / f"root/n{i % 3}/n{i % 3}_{i}.JPEG"), i % 3) for i in range(IMAGES)]
        write_csv(folder, rows)
        run(folder)
        assert TokenCache.open(folder / "cache").names[4] == "n1/n1_4.JPEG"


class TestOrder:
    def test_by_index_then_by_last_number(self, tmp_path):
        for name in ("ade10_index_9_bsize_16.pth", "ade10_index_10_bsize_16.pth", "ade10_index_100_bsize_16.pth"):
            (tmp_path / name).touch()
        assert [path.name.split("_")[2] for path in ordered_token_files(tmp_path)] == ["9", "10", "100"]
        other = tmp_path / "other"
        other.mkdir()
        for name in ("v2_part10.pt", "v2_part9.pt", "notes.txt"):
            (other / name).touch()
        assert [path.name for path in ordered_token_files(other)] == ["v2_part9.pt", "v2_part10.pt"]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([], "no token file"),
            (["a.pth", "b1.pth"], r"a\.pth has no number"),
            (["index_1_a.pth", "index_01_b.pth"], "have the same number"),
        ],
    )
    def test_no_safe_order(self, tmp_path, names, message):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(DataError, match=message):
            ordered_token_files(tmp_path)


class TestRefused:
    def refuse(self, layout, message, **changes):
        folder, _ = layout
        with pytest.raises(DataError, match=message):
            run(folder, **changes)
        assert not (folder / "cache").exists() and not list(folder.glob(".cache*"))

    def test_other_number_of_rows(self, layout):
        shard(layout[0], 500).unlink()
        self.refuse(layout, r"train\.csv lists 10 images, the token files hold 5 rows \(.*index_0_.*: 1")

    @pytest.mark.parametrize("value", [-1, 8192])
    def test_out_of_range(self, layout, value):
        folder, tokens = layout
        tokens[3, 2] = value
        torch.save(tokens[1:6].int(), shard(folder, 500))
        self.refuse(layout, rf"index_500_bsize_16\.pth holds tokens .*{value}.*allowed are 0 to 8191")

    def test_no_square_grid_and_mixed_grids(self, layout):
        folder, tokens = layout
        torch.save(tokens[1:6, :9].int(), shard(folder, 500))
        self.refuse(layout, r"index_500_bsize_16\.pth holds 9 tokens an image")
        torch.save(tokens[:, :15].int(), folder / "all.pth")
        self.refuse(layout, r"all\.pth holds 15 tokens an image", token_files=folder / "all.pth")

    def test_grid_that_does_not_divide_the_image(self, layout):
        with pytest.raises(ConfigError, match="image_size 18 is not divisible by the tokenizer's grid 4"):
            run(layout[0], image_size=18)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.zeros(10, 16), "torch.float32"),
            (torch.zeros(10, 4, 4, dtype=torch.int32), r"\(10, 4, 4\)"),
            (torch.zeros(0, 16, dtype=torch.int32), r"\(0, 16\)"),
            ({"tokens": torch.zeros(10, 16, dtype=torch.int32)}, "holds a dict"),
            ([1, 2], "holds a list"),
            (torch.zeros(1, 1, dtype=torch.int32).expand(10, 10**12), "does not hold as many"),
            (torch.zeros(10, 16, dtype=torch.int32).to_sparse(), "a tensor of layout"),
        ],
    )
    def test_other_content(self, layout, content, message):
        torch.save(content, layout[0] / "all.pth")
        self.refuse(layout, rf"all\.pth .*{message}", token_files=layout[0] / "all.pth")

    @pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
    def test_pickle_with_code_is_refused_and_not_run(self, layout, save):
        folder, _ = layout
        save(Trap(folder / "ran"), folder / "all.pth")
        self.refuse(layout, r"all\.pth \(no code in it was run\)", token_files=folder / "all.pth")
        assert not (folder / "ran").exists()

    def test_truncated_empty_and_missing(self, layout):
        folder, _ = layout
        whole = shard(folder, 500).read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"not a tensor"):
            shard(folder, 500).write_bytes(content)
            self.refuse(layout, r"cannot load tokens from .*index_500")
        self.refuse(layout, r"none\.pth", token_files=[folder / "none.pth"])

    @pytest.mark.parametrize(
        ("rows", "header", "message"),
        [
            ([("n0/n0_0.JPEG", 0)], ("class", "path"), "expected the header path,class"),
            ([], ("path", "class"), "lists no image"),
            ([("n0/n0_0.JPEG", "cat")], ("path", "class"), r"line 2: .*class number"),
            ([("n0/n0_0.JPEG", -1)], ("path", "class"), r"line 2: .*class number"),
            ([("n0/n0_0.JPEG", 10**15)], ("path", "class"), r"line 2: .*class number below"),
            ([("n0/n0_0.JPEG", 0, 1)], ("path", "class"), r"line 2"),
            ([("n0/n0_0.JPEG", 0), ("../secret.png", 0)], ("path", "class"), r"line 3: \.\./secret\.png is not below"),
            ([("/etc/secret.png", 0)], ("path", "class"), r"line 2: /etc/secret\.png is not below"),
        ],
    )
    def test_csv(self, layout, rows, header, message):
        write_csv(layout[0], rows, header)
        self.refuse(layout, rf"train\.csv.*{message}")

    def test_csv_that_is_no_text_or_missing(self, layout):
        (layout[0] / "train.csv").write_bytes(b"path,class\n\xff\xfe,0\n")
        self.refuse(layout, r"cannot read .*train\.csv")
        (layout[0] / "train.csv").unlink()
        self.refuse(layout, r"cannot read .*train\.csv")

    def test_class_names(self, layout):
        folder, _ = layout
        np.save(folder / "classes.npy", np.array([Trap(folder / "ran")], dtype=object), allow_pickle=True)
        self.refuse(layout, r"cannot read class names from .*classes\.npy", class_names=folder / "classes.npy")
        assert not (folder / "ran").exists()
        np.save(folder / "classes.npy", np.array(["n0", "n1"]))
        self.refuse(layout, "names 2 classes, the CSV has class numbers up to 2", class_names=folder / "classes.npy")
        np.save(folder / "classes.npy", np.arange(5))
        self.refuse(layout, "not a one-dimensional array of text", class_names=folder / "classes.npy")
