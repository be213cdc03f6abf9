"""A tokenizer that nothing else knows of: Toy, whose feature of a patch is its mean colour, by one line of registry.

It is fitted, saved, found again and tokenises, by the command, and is refused where its name is unknown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mapet import tokenizers
from mapet.cli import main as mapet
from mapet.data.cache import TokenCache
from mapet.data.decode import centre_square
from mapet.errors import DataError
from mapet.tokenizers import load_tokenizer
from mapet.tokenizers.kmeans import KMeansTokenizer

PACKAGE = Path(tokenizers.__file__).parents[1]


class Toy(KMeansTokenizer):
    """Mean colours of patches."""

    name = "toy"

    @property
    def input_size(self) -> int:
        return self.image_size

    @property
    def feature_size(self) -> int:
        return 3

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(centre_square(image, self.input_size))

    def features(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images / 255, self.patch_size).flatten(2).mT


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a tokenizer needs."""
    monkeypatch.setitem(tokenizers.TOKENIZERS, "toy", f"{__name__}:Toy")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Pictures of four plain tiles each, in four colours."""
    folder, generator = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    for number in range(12):
        tiles = colours[generator.permutation(4).reshape(2, 2)]
        Image.fromarray(tiles.repeat(8, axis=0).repeat(8, axis=1)).save(folder / f"{number}.png")
    return folder


def command(images: Path, cache: Path) -> list[str]:
    sizes = ["--image-size", "16", "--patch-size", "8", "--vocabulary", "4", "--workers", "0", "--device", "cpu"]
    return ["tokenize", "--images", str(images), "--output", str(cache), "--tokenizer", "toy", *sizes]


def test_it_is_fitted_saved_and_tokenises(registered: None, images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert mapet(command(images, cache)) == 0
    opened, saved = TokenCache.open(cache), load_tokenizer(tmp_path / "cache_tokenizer")
    assert opened.tokenizer == saved.name == "toy" and type(saved).__name__ == "Toy"
    tokens = opened.tokens(range(12))
    assert (tokens.sort(dim=1).values == torch.arange(4)).all(), "each colour has an entry of its own"
    assert torch.equal(saved.encode(opened.read(range(12))), tokens)


def test_where_its_name_is_unknown_it_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as context:
        context.setitem(tokenizers.TOKENIZERS, "toy", f"{__name__}:Toy")
        assert mapet(command(images, tmp_path / "cache")) == 0
    with pytest.raises(DataError, match="holds an unknown tokenizer 'toy'; known are pixel, kclip"):
        load_tokenizer(tmp_path / "cache_tokenizer")
    assert mapet(command(images, tmp_path / "other")) == 2
    assert "unknown tokenizer 'toy'; choose one of pixel, kclip" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_nothing_else_knows_its_name() -> None:
    assert [path for path in PACKAGE.rglob("*.py") if "toy" in path.read_text().lower()] == []
