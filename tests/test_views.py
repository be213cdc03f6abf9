"""Random views: the library's pixels, and the same ones whatever the processes, workers and resumes."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from datafakes import NoiseSource, write_cache
from PIL import Image
from tiny_run import make_config
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from mapet.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from mapet.data.images import open_source
from mapet.data.loader import Share, make_loader, split_images, step_ids
from mapet.data.views import STAND_INS, ViewConfig, Views, drawing_from
from mapet.errors import ConfigError, DataError, FieldError
from mapet.objectives import OBJECTIVES
from mapet.task import Task
from mapet.training.checkpoint import CheckpointStore
from mapet.training.loop import pretrain

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

MAE = ViewConfig(scale=(0.2, 1.0))
BEIT = ViewConfig(brightness=0.4, contrast=0.4, saturation=0.4)
SHIFTED = ViewConfig(crop="shifted")
LUT = replace(SHIFTED, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_probability=0.8, distortion=True)
PROBE = ViewConfig(interpolation="bilinear")
METHODS = {"mae": MAE, "beit": BEIT, "lut 1": SHIFTED, "lut 2": LUT, "vqkd": ViewConfig(), "probe": PROBE}
SMALL = ViewConfig(size=8, brightness=0.4, contrast=0.4, saturation=0.4)
ALL = slice(None)


def picture(width: int = 60, height: int = 44, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """30 images of three classes, of many sizes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(30):
        path = root / "abc"[number % 3] / f"{number:02d}.{'png' if number % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        picture(20 + number, 44 - number, number).save(path)
    return root


def batches(data, start=0, stop=6, *, global_batch=8, **options) -> list[dict[str, torch.Tensor]]:
    with make_loader(data, seed=3, global_batch=global_batch, start_step=start, stop_step=stop, **options) as loader:
        return list(loader)


def check_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def published(name: str) -> v2.Transform:
    """The transform as the method's own code writes it, in torchvision's words."""
    bicubic, bilinear = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR
    flip, jitter = v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)
    shifted = [v2.Resize(224, bicubic), v2.RandomCrop(224, padding=4, padding_mode="reflect"), flip]
    three = [v2.RandomGrayscale(1.0), v2.RandomSolarize(128, 1.0), v2.GaussianBlur(13, (0.1, 2.0))]
    return v2.Compose(
        {
            "mae": [v2.RandomResizedCrop(224, (0.2, 1.0), interpolation=bicubic), flip],
            "beit": [v2.RandomResizedCrop(224, interpolation=bicubic), flip, v2.RandomApply([jitter], 1.0)],
            "lut 1": shifted,
            "lut 2": [*shifted, v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomChoice(three)],
            "vqkd": [v2.RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3), bicubic), flip],
            "probe": [v2.RandomResizedCrop(224, interpolation=bilinear), flip],
        }[name]
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_view_is_what_torchvision_makes_with_the_global_generator_seeded_alike(name):
    transform, image = published(name), picture(300, 240)
    for seed in range(12):
        torch.manual_seed(seed)
        expected = functional.pil_to_tensor(transform(image))
        before = torch.get_rng_state()
        found = METHODS[name].view(image, seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
        assert found.dtype == torch.uint8 and found.shape == (3, 224, 224) and torch.equal(found, expected)


@pytest.mark.parametrize("config", [ViewConfig(), MAE, ViewConfig(scale=(0.5, 0.6), ratio=(1.0, 2.0))])
def test_crops_are_distributed_as_torchvisions(config):
    """Boxes of 2,000 seeds of ours against 2,000 in a row of the global generator: quantiles of area, shape, place."""
    crop, image, boxes = config.transform.transforms[0], picture(200, 150), [[], []]
    torch.manual_seed(0)
    for number in range(2000):
        boxes[0].append(crop.make_params([image]))
        with drawing_from(torch.Generator().manual_seed(1000 + number)):
            boxes[1].append(crop.make_params([image]))
    quantiles = []
    for some in boxes:
        top, left, height, width = (
            np.array([box[name] for box in some]) for name in ("top", "left", "height", "width")
        )
        assert (top >= 0).all() and (left >= 0).all() and (top + height <= 150).all() and (left + width <= 200).all()
        area, shape = height * width / 30_000, width / height
        assert area.min() > config.scale[0] - 0.01 and area.max() <= config.scale[1] + 0.01
        places = [top / np.maximum(150 - height, 1), left / np.maximum(200 - width, 1)]
        quantiles.append([np.quantile(x, [0.1, 0.3, 0.5, 0.7, 0.9]) for x in (area, shape, *places)])
    ours, theirs = np.array(quantiles[1]), np.array(quantiles[0])
    np.testing.assert_allclose(ours, theirs, atol=0.07)


def test_a_flip_mirrors_and_jitter_changes_by_the_drawn_factors():
    image = picture(32, 32)
    plain = functional.pil_to_tensor(image)
    whole = ViewConfig(size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    flipped = [view for seed in range(40) if not torch.equal(view := whole.view(image, seed), plain)]
    assert 8 < len(flipped) < 32 and all(torch.equal(view, plain.flip(2)) for view in flipped)
    assert torch.equal(replace(whole, flip=1.0).view(image, 0), plain.flip(2))
    bright = replace(whole, flip=0.0, brightness=0.4)
    for seed in range(10):
        found = bright.view(image, seed)
        with drawing_from(torch.Generator().manual_seed(seed)):
            for step in bright.transform.transforms[:2]:
                step(image)
            torch.rand(1)  # whether to jitter
            torch.randperm(4)
            factor = float(torch.empty(1).uniform_(0.6, 1.4))
        assert torch.equal(found, functional.pil_to_tensor(functional.adjust_brightness(image, factor)))
    never = replace(bright, jitter_probability=0.0)
    assert all(torch.equal(never.view(image, seed), plain) for seed in range(10))


@pytest.mark.parametrize(
    ("size", "part", "side"), [(224, 0.875, 256), (224, 0.9, 248), (224, 1.0, 224), (96, 0.875, 109)]
)
def test_evaluation_takes_the_centre(size, part, side):
    image = picture(400, 300)
    resized = functional.resize(image, side, interpolation=v2.InterpolationMode.BICUBIC)
    expected = functional.pil_to_tensor(functional.center_crop(resized, [size, size]))
    assert torch.equal(ViewConfig(size=size, evaluation_crop=part).view(image, None), expected)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (4, 0)])
def test_the_same_pixels_for_all_processes_and_workers(folder, processes, workers):
    data = Views(open_source(folder), (SMALL, replace(SMALL, flip=0.0)))
    whole = batches(data)
    assert whole[0]["images"].shape == (8, 2, 3, 8, 8) and whole[0]["images"].dtype == torch.uint8
    assert not torch.equal(whole[0]["images"][:, 0], whole[0]["images"][:, 1]), "each view has its own draws"
    parts = [batches(data, rank=r, world_size=processes, workers=workers) for r in range(processes)]
    check_same(
        [{name: torch.cat([p[name] for p in step]) for name in step[0]} for step in zip(*parts, strict=True)], whole
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_is_exact_and_the_global_generators_are_left_alone(folder, workers):
    data = Views(open_source(folder), (SMALL,))
    torch.manual_seed(1)
    before, others = torch.get_rng_state(), np.random.get_state()[1].copy()
    whole = batches(data, 0, 9)
    for middle in (2, 3, 5):  # 3 steps an epoch
        check_same(batches(data, 0, middle, workers=workers) + batches(data, middle, 9, workers=workers), whole)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], others)
    assert not any(torch.equal(whole[0]["images"], other["images"]) for other in whole[1:])
    again = pickle.loads(pickle.dumps(data))  # as for spawned workers
    check_same(batches(again, 0, 2), whole[:2])


def test_images_and_labels_go_together(folder):
    source = open_source(folder)
    plain, whole = ViewConfig(size=16, scale=(1.0, 1.0), flip=0.0), []
    for step, batch in enumerate(batches(Views(source, (plain,)))):
        assert batch["images"].shape == (8, 3, 16, 16), "views of one are no dimension"
        assert torch.equal(batch["ids"], step_ids(30, seed=3, step=step, global_batch=8))
        assert batch["labels"].dtype == torch.int64
        assert batch["labels"].tolist() == ["abc".index(source.names[i][0]) for i in batch["ids"].tolist()]
        for image, index in zip(batch["images"], batch["ids"].tolist(), strict=True):
            original = source.load(index)
            if 3 / 4 <= original.width / original.height <= 4 / 3:  # a crop of all of it is the image itself, resized
                expected = original.resize((16, 16), Image.Resampling.BICUBIC)
                assert torch.equal(image, functional.pil_to_tensor(expected))
                whole.append(index)
    assert len(whole) > 5
    assert "labels" not in batches(Views(NoiseSource(labelled=False), (plain,)), 0, 1)[0]


def test_crops_of_a_cache_are_images_too(tmp_path):
    cache, images, _ = write_cache(tmp_path / "cache", 10)
    data = Views(cache, (replace(SMALL, scale=(0.5, 1.0)),))
    batch = batches(data, 0, 1)[0]
    assert batch["images"].shape == (8, 3, 8, 8) and batch["labels"].tolist() == (batch["ids"] % 2).tolist()
    assert data.fingerprint() == cache.fingerprint() and "tokens" not in batch
    same = Views(cache, (ViewConfig(size=8, crop="shifted", padding=0, flip=0.0),))
    batch = batches(same, 0, 1)[0]
    assert torch.equal(batch["images"], images[batch["ids"]])


def test_held_out_images_are_judged_by_their_centre(folder):
    data = Views(open_source(folder), (SMALL, SMALL))
    share = Share(3, -1, 4, ALL)
    batch = data.batch(torch.tensor([4, 7]), share, lambda: None)
    expected = torch.stack([SMALL.view(data.images.load(i), None) for i in (4, 7)])
    assert torch.equal(batch["images"][:, 0], expected) and torch.equal(batch["images"][:, 1], expected)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def test_a_damaged_image_is_replaced_by_the_next_for_everybody_alike(folder, tmp_path):
    root = copied(folder, tmp_path)
    names = open_source(root).names
    for place in (4, 5, 29):
        damage(root / names[place])
    data = Views(open_source(root), (SMALL,))
    with pytest.warns(UserWarning, match=rf"{names[4]}.*image {names[5]} is taken in its place"):
        whole = batches(data, 0, 3)
    wanted = torch.cat([step_ids(30, seed=3, step=step, global_batch=8) for step in range(3)]).tolist()
    taken = torch.cat([batch["ids"] for batch in whole]).tolist()
    assert taken == [{4: 6, 5: 6, 29: 0}.get(i, i) for i in wanted] and {4, 5, 29} & set(wanted)
    assert torch.cat([batch["labels"] for batch in whole]).tolist() == [data.images.labels[i] for i in taken]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_same(batches(data, 0, 1) + batches(data, 1, 3), whole)
        parts = [batches(data, 0, 3, rank=rank, world_size=2) for rank in range(2)]
    assert [[*a["ids"].tolist(), *b["ids"].tolist()] for a, b in zip(*parts, strict=True)] == [
        batch["ids"].tolist() for batch in whole
    ]


@pytest.mark.filterwarnings("ignore:cannot read image")
def test_what_is_held_out_takes_no_part_in_it():
    """Neither is an image that is learned from replaced by one that is held out, nor the other way round."""
    split = split_images(30, make_config(Path("c"), Path("o"), **{"data.held_out": 0.4}))
    data = Views(NoiseSource(30, bad=range(0, 30, 2)), (SMALL,))
    for step, ids in ((0, split.ids), (-1, split.held_out)):
        taken = data.batch(ids, Share(3, step, len(ids), ALL, ids), lambda: None)["ids"].tolist()
        good = [i for i in ids.tolist() if i % 2]
        assert taken == [min((g for g in good if g >= i), default=good[0]) for i in ids.tolist()]


def test_an_image_that_may_be_back_in_a_minute_is_not_replaced(folder, tmp_path, monkeypatch):
    root = copied(folder, tmp_path)
    data = Views(open_source(root), (SMALL,))
    data.check_model(ModelConfig(image_size=8, patch_size=4))
    missing = step_ids(30, seed=3, step=1, global_batch=8)[2]
    (root / data.images.names[missing]).unlink()
    with pytest.raises(DataError, match=rf"{data.images.names[missing]}: No such file"):
        batches(data, 0, 3)
    with pytest.raises(DataError, match=r"1 images of .* are not there.*take them away"):
        data.check_model(ModelConfig(image_size=8, patch_size=4))
    assert len(batches(data, 0, 1)) == 1, "what came before is given"


@pytest.mark.filterwarnings("ignore:cannot read image")
def test_images_of_which_none_can_be_read():
    with pytest.raises(DataError, match=rf"{STAND_INS} images in a row cannot be read, of the last: .*noise"):
        batches(Views(NoiseSource(10, bad=range(10)), (SMALL,)), 0, 1)


def copied(folder: Path, root: Path) -> Path:
    for path in sorted(folder.rglob("*.*")):
        target = root / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": (0.5, 0.2)}, r"view\.scale must be the smaller number first, got 0\.5 0\.2"),
        ({"scale": (0.0, 1.0)}, r"view\.scale\[0\] must be in \(0, 1\], got 0"),
        ({"ratio": (2.0, 1.0)}, r"view\.ratio must be the smaller"),
        ({"flip": 1.5}, r"view\.flip must be in \[0, 1\]"),
        ({"hue": 0.6}, r"view\.hue must be at most 0\.5"),
        ({"brightness": -1.0}, r"view\.brightness must be not negative, got -1\.0"),
        ({"interpolation": "nearest"}, r"view\.interpolation must be one of bicubic, bilinear, lanczos"),
        ({"crop": "shifted", "size": 4}, r"view\.padding must be below view\.size 4, got 4"),
        ({"evaluation_crop": 0.0}, r"view\.evaluation_crop must be in \(0, 1\]"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(FieldError, match=message):
        ViewConfig(**changes)


def test_views_that_do_not_go_together_or_with_the_model():
    with pytest.raises(ConfigError, match=r"views of an image have one size, in pixels, got \[8, 16\]"):
        Views(NoiseSource(), (SMALL, replace(SMALL, size=16)))
    with pytest.raises(ConfigError, match="got no view"):
        Views(NoiseSource(), ())
    with pytest.raises(DataError, match=r"views are 8 pixels wide, and model\.image_size is 16"):
        Views(NoiseSource(), (SMALL,)).check_model(ModelConfig(image_size=16, patch_size=4))


@dataclass(frozen=True)
class PixelsConfig(ObjectiveConfig):
    name: Literal["pixels"] = "pixels"


class Pixels(Task):
    """Labels from pixels by one linear layer: about the smallest method over views that there is."""

    Options: ClassVar = PixelsConfig
    folder: ClassVar[Path]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(3 * 16 * 16, 3)

    @classmethod
    def open(cls, config):
        data = Views(open_source(cls.folder), (replace(SMALL, size=16),))
        data.check_model(config.model)
        return data

    def draw(self, images, rng):
        return {"noise": torch.rand(images, 1, generator=rng.generator("noise"))}

    def forward(self, batch, draws, *, metrics=True):
        logits = self.head(batch["images"].flatten(1) / 255 + 0.1 * draws["noise"])
        right = (logits.argmax(1) == batch["labels"]).float().mean()
        return {"loss": nn.functional.cross_entropy(logits, batch["labels"]), "accuracy": right}

    def example(self, images):
        return {"images": torch.empty(images, 3, 16, 16, dtype=torch.uint8), "labels": torch.empty(images).long()}

    def units(self):
        return [self.head]

    def backbone(self):
        return self.config, {}


def test_a_method_over_views_is_trained_judged_and_resumed_exactly(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "pixels", f"{__name__}:Pixels")
    monkeypatch.setattr(Pixels, "folder", folder, raising=False)
    base = make_config(Path("unused"), tmp_path)
    config = replace(base, objective=PixelsConfig(), data=DataConfig(workers=0, held_out=0.2))

    def run(name: str, steps: int, **changes) -> dict[str, torch.Tensor]:
        train = replace(config.train, output=tmp_path / name, max_steps=steps, **changes)
        result = pretrain(replace(config, train=train, data=replace(config.data, workers=2 * (name == "resumed"))))
        assert {"accuracy", "val_loss", "val_accuracy"} == result.metrics.keys()
        store = CheckpointStore(tmp_path / name / "checkpoints")
        return result.metrics, store.load(steps).state.task

    straight = run("straight", 7)
    run("resumed", 4)
    resumed, parts = run("resumed", 7), run("parts", 7, micro_batch=2)
    assert resumed[0] == straight[0] and all(torch.equal(resumed[1][n], w) for n, w in straight[1].items())
    torch.testing.assert_close(parts[1], straight[1], rtol=1e-4, atol=1e-6)
