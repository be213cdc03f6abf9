"""Image sources, decoding and the centre square: every kind of file is read rightly or refused by name."""

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datafakes import NoiseSource, without_root, write_cache
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from mapet.data import builtin, sources
from mapet.data.cache import TokenCache
from mapet.data.decode import centre_square, decode
from mapet.data.images import Some, Squares
from mapet.data.sources import folder_source, open_source
from mapet.errors import ConfigError, DataError


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(6, 5) if pixels is None else pixels).save(path)
    return path


class TestDecode:
    @pytest.mark.parametrize("extension", ["png", "bmp", "tif", "webp", "gif", "ppm"])
    def test_lossless_formats_keep_the_pixels(self, tmp_path, extension):
        pixels = np.repeat(noise(6, 5, channels=1)[..., None], 3, axis=2)  # grey, so that GIF's palette holds it
        image = Image.fromarray(pixels)
        image.save(tmp_path / f"x.{extension}", **({"lossless": True} if extension == "webp" else {}))
        assert np.array_equal(np.asarray(decode(tmp_path / f"x.{extension}")), pixels)

    def test_cmyk_jpeg_becomes_rgb_of_about_the_same_colour(self, tmp_path):
        colour = (200, 60, 30)
        Image.new("RGB", (32, 32), colour).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
        image = decode(tmp_path / "x.jpg")
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= 4

    @pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path, extension):
        levels = np.array([[0, 255, 257, 32896, 65535]], dtype=np.uint16)
        Image.fromarray(levels).save(tmp_path / f"x.{extension}")
        assert np.asarray(decode(tmp_path / f"x.{extension}"))[0, :, 0].tolist() == [0, 1, 1, 128, 255]

    def test_sixteen_bit_colour_png_keeps_its_high_bytes(self, tmp_path):
        row = struct.pack(">6H", 0, 0x8040, 0xFFFF, 0x1234, 0x00FF, 0x0100)  # two pixels
        (tmp_path / "x.png").write_bytes(png_bytes(2, 1, depth=16, colour=2, rows=b"\0" + row))
        assert np.asarray(decode(tmp_path / "x.png")).tolist() == [[[0, 0x80, 0xFF], [0x12, 0, 1]]]

    def test_float_tiff_is_scaled_and_out_of_range_is_refused(self, tmp_path):
        Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "x.tif")
        assert np.asarray(decode(tmp_path / "x.tif"))[0, :, 0].tolist() == [0, 128, 255]
        for value in (1.5, -0.1, np.nan):
            Image.fromarray(np.array([[0.0, value]], dtype=np.float32)).save(tmp_path / "y.tif")
            with pytest.raises(DataError, match=r"y\.tif.*grey values"):
                decode(tmp_path / "y.tif")

    def test_alpha_is_composited_on_white(self, tmp_path):
        pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "x.png")
        assert np.asarray(decode(tmp_path / "x.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]

    def test_grey_with_alpha_and_transparent_palette(self, tmp_path):
        Image.fromarray(np.array([[[7, 255], [7, 0]]], dtype=np.uint8), "LA").save(tmp_path / "la.png")
        assert np.asarray(decode(tmp_path / "la.png"))[0, :, 0].tolist() == [7, 255]
        palette = Image.new("P", (2, 1))
        palette.putpalette([1, 2, 3, 4, 5, 6])
        palette.putdata([0, 1])
        palette.save(tmp_path / "p.png", transparency=1)
        assert np.asarray(decode(tmp_path / "p.png")).tolist() == [[[1, 2, 3], [255, 255, 255]]]

    def test_exif_orientation_is_applied_unless_plain(self, tmp_path):
        image = Image.fromarray(noise(8, 4))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees
        image.save(tmp_path / "x.png", exif=exif)
        assert decode(tmp_path / "x.png").size == (4, 8)
        assert np.array_equal(np.asarray(decode(tmp_path / "x.png")), np.rot90(np.asarray(image), -1))
        assert np.array_equal(np.asarray(decode(tmp_path / "x.png", plain=True)), np.asarray(image))

    def test_one_pixel(self, tmp_path):
        png(tmp_path / "x.png", np.full((1, 1, 3), 77, np.uint8))
        assert np.unique(centre_square(decode(tmp_path / "x.png"), 16)).tolist() == [77]

    @pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "tif", "gif"])
    def test_truncated_file_is_refused_by_name(self, tmp_path, extension):
        path = tmp_path / f"x.{extension}"
        Image.fromarray(noise(64, 64)).save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"cannot read image .*x\.{extension}"):
            decode(path)

    @pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
    def test_other_content_under_an_image_name_is_refused(self, tmp_path, content):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jpg: not an image"):
            decode(tmp_path / "x.jpg")

    @pytest.mark.parametrize("side", [10_000, 20_000])  # one of the pixel counts that Pillow warns of, one it refuses
    def test_decompression_bomb_is_refused_before_decoding(self, tmp_path, side):
        (tmp_path / "x.png").write_bytes(png_bytes(side, side, depth=8, colour=2, rows=b""))
        with pytest.raises(DataError, match=r"x\.png: more than \d+ pixels"):
            decode(tmp_path / "x.png")

    def test_decompression_bomb_in_a_text_chunk(self, tmp_path):
        bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"0" * 10_000_000))
        whole = png_bytes(1, 1, depth=8, colour=0, rows=b"\0\0")
        (tmp_path / "x.png").write_bytes(whole[:33] + bomb + whole[33:])
        with pytest.raises(DataError, match=r"x\.png"):
            decode(tmp_path / "x.png")

    def test_missing_file_folder_and_named_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        for name, reason in (("none.png", "No such file"), ("", "a folder, not a file"), ("pipe.png", "a named pipe")):
            with pytest.raises(DataError, match=reason):
                decode(tmp_path / name)

    def test_unreadable_file_and_folder(self, tmp_path):
        png(tmp_path / "x.png").chmod(0)
        with without_root(), pytest.raises(DataError, match=r"x\.png: Permission denied"):
            decode(tmp_path / "x.png")
        (tmp_path / "cat").mkdir(mode=0)
        with without_root(), pytest.raises(DataError, match=r"image folder .*Permission denied"):
            folder_source(tmp_path)

    def test_flipped_bytes_never_raise_anything_else(self, tmp_path):
        generator = np.random.default_rng(0)
        for extension in ("jpg", "png", "webp", "bmp", "tif", "gif"):
            path = tmp_path / f"x.{extension}"
            Image.fromarray(noise(16, 16)).save(path)
            whole = np.frombuffer(path.read_bytes(), np.uint8)
            for _ in range(20):
                damaged = whole.copy()
                damaged[generator.integers(0, len(whole), 4)] = generator.integers(0, 256, 4)
                path.write_bytes(damaged.tobytes())
                try:
                    assert decode(path).mode == "RGB"
                except DataError as error:
                    assert str(path) in str(error)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bytes(width, height, *, depth, colour, rows):
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class TestFolder:
    def test_class_folders_nested_and_sorted(self, tmp_path):
        for name in ("dog/2.png", "dog/10.PNG", "cat/deep/er/1.jpg", "cat/.hidden.png", "cat/notes.txt", ".git/x.png"):
            png(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("")
        source = folder_source(tmp_path)
        assert source.names == ["cat/deep/er/1.jpg", "dog/10.PNG", "dog/2.png"]
        assert source.classes == ["cat", "dog"]
        assert source.labels.tolist() == [0, 1, 1] and source.labels.dtype == np.int64
        assert len(source) == 3 and source.load(1).size == (6, 5)

    def test_flat_folder_has_no_labels(self, tmp_path):
        png(tmp_path / "b.png"), png(tmp_path / "a.webp"), png(tmp_path / "sub/c.png")
        source = open_source(tmp_path)
        assert source.names == ["a.webp", "b.png", "sub/c.png"]
        assert source.labels is None and source.classes is None

    def test_empty_missing_and_file(self, tmp_path):
        (tmp_path / "readme.txt").write_text("")
        with pytest.raises(DataError, match="no image in"):
            open_source(str(tmp_path))
        with pytest.raises(DataError, match=r"none: .*No such file.*digits, photos"):
            open_source(tmp_path / "none")
        with pytest.raises(DataError, match="is a file"):
            open_source(tmp_path / "readme.txt")

    def test_link_to_a_parent_is_refused_and_other_links_are_followed(self, tmp_path):
        png(tmp_path / "store/a.png")
        (tmp_path / "data").mkdir()
        (tmp_path / "data/cat").symlink_to(tmp_path / "store")
        assert folder_source(tmp_path / "data").names == ["cat/a.png"]
        (tmp_path / "store/loop").symlink_to(tmp_path / "data")
        with pytest.raises(DataError, match=r"loop links back to"):
            folder_source(tmp_path / "data")

    def test_link_to_itself_and_dangling_link_are_bad_images_not_a_crash(self, tmp_path):
        png(tmp_path / "a.png")
        (tmp_path / "loop.png").symlink_to("loop.png")
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "nowhere.png").symlink_to("missing.png")
        source = folder_source(tmp_path)
        assert source.names == ["a.png", "loop.png", "nowhere.png"]
        assert len(source.fingerprint()) == 64
        for index in (1, 2):
            with pytest.raises(DataError, match=source.names[index]):
                source.load(index)

    def test_fingerprint_sees_names_and_sizes(self, tmp_path):
        png(tmp_path / "a.png")
        before = folder_source(tmp_path).fingerprint()
        assert folder_source(tmp_path).fingerprint() == before
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes() + b"x")
        longer = folder_source(tmp_path).fingerprint()
        (tmp_path / "a.png").rename(tmp_path / "b.png")
        assert len({before, longer, folder_source(tmp_path).fingerprint()}) == 3

    def test_files_are_looked_at_once_for_the_fingerprint(self, tmp_path, monkeypatch):
        source, stats = folder_source(png(tmp_path / "a.png").parent), []
        monkeypatch.setattr(sources, "_stat", lambda path: stats.append(path))
        assert source.fingerprint() == source.fingerprint() and stats == [tmp_path / "a.png"]

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    def test_names_that_are_not_unicode(self, tmp_path):
        png(tmp_path / "a.png").rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")))
        source = folder_source(tmp_path)
        assert source.load(0).size == (6, 5)
        assert len(source.fingerprint()) == 64


class TestBuiltIn:
    def test_digits(self):
        source = open_source("digits")
        assert len(source) == 1797 and source.classes == list("0123456789")
        assert source.labels[:10].tolist() == list(range(10)) and source.labels.dtype == np.int64
        image = np.asarray(source.load(0))
        assert image.shape == (8, 8, 3) and image.max() > 200 and image.min() == 0
        assert len(set(source.names)) == 1797
        assert source.fingerprint() == open_source("digits").fingerprint()

    def test_photographs_load_without_network(self):
        source = open_source("photos")
        assert source.names == list(builtin.PHOTOGRAPHS) and source.labels is None
        for index in range(len(source)):
            image = source.load(index)
            assert image.mode == "RGB" and 100 < min(image.size) <= 512
            assert np.asarray(image).std() > 10

    def test_tiles_cover_a_photograph_and_are_cut_where_they_say(self):
        whole, tiles, dense = open_source("photos"), open_source("photos:128"), open_source("photos:128:64")
        assert 150 < len(tiles) < len(dense)
        assert len(set(tiles.names)) == len(tiles) and set(tiles.names) < set(dense.names)
        index = tiles.names.index("astronaut.png/0128_0256")
        expected = np.asarray(whole.load(whole.names.index("astronaut.png")))[128:256, 256:384]
        assert np.array_equal(np.asarray(tiles.load(index)), expected)
        assert len({s.fingerprint() for s in (whole, tiles, dense)}) == 3

    @pytest.mark.parametrize("spec", ["photos:0", "photos:-4", "photos:big", "photos:96:", "photos:5000"])
    def test_impossible_tiles(self, spec):
        with pytest.raises(ConfigError, match="photos"):
            open_source(spec)

    def test_missing_scikit_image_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match="pip install"):
            open_source("photos")


class TestCentreSquare:
    @pytest.mark.parametrize("size", [(40, 23), (23, 40), (41, 22), (30, 30), (500, 333)])
    def test_is_the_official_crop(self, size):
        image = Image.fromarray(noise(*size))
        crop = RandomResizedCrop(32, scale=(1, 1), ratio=(1, 1), interpolation=InterpolationMode.BICUBIC)
        found = centre_square(image, 32)
        assert found.shape == (3, 32, 32) and found.dtype == np.uint8 and found.flags.c_contiguous
        assert np.array_equal(found, np.asarray(crop(image)).transpose(2, 0, 1))

    def test_same_size_is_untouched(self):
        pixels = noise(16, 16)
        assert np.array_equal(centre_square(Image.fromarray(pixels), 16), pixels.transpose(2, 0, 1))


class TestImages:
    """Folders and caches, read alike."""

    def test_squares_of_a_source(self):
        source = NoiseSource(5, bad=[3])
        images = Squares(source, 8)
        expected = np.stack([centre_square(source.load(i), 8) for i in (4, 0)])
        assert np.array_equal(images.read([4, 0]).numpy(), expected)
        assert torch.equal(images[0:2], images.read([0, 1])) and len(images) == 5
        assert (images.names, images.classes) == (source.names, source.classes)
        with pytest.raises(DataError, match="noise_3: broken; take it away, or give a token cache"):
            images.read([3])
        assert len({Squares(NoiseSource(n), size).fingerprint() for n, size in ((5, 8), (6, 8), (5, 9))}) == 3

    def test_a_cache_and_some_of_it(self, tmp_path):
        cache, pixels, _ = write_cache(tmp_path / "cache")
        some = Some(cache, [7, 2, 4])
        assert (cache.size, some.size, len(some)) == (8, 8, 3)
        assert torch.equal(cache.read([1, 0]), pixels[[1, 0]]) and torch.equal(some[1:3], pixels[[2, 4]])
        assert some.names == ["im/7.png", "im/2.png", "im/4.png"] and some.labels.tolist() == [1, 0, 0]
        assert cache.fingerprint() == TokenCache.open(cache.path).fingerprint()
        others = (cache, some, Some(cache, [2, 7, 4]), write_cache(tmp_path / "other", seed=1)[0])
        assert len({images.fingerprint() for images in others}) == 4


def test_a_name_that_could_mean_a_folder_or_a_built_in_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(DataError, match=r"digits is a built-in set, and a folder here: give \./digits for the folder"):
        open_source("digits")
