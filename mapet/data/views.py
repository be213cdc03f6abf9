"""Random views of images, decoded whenever they are wanted: what MAE, LUT, VQ-KD and fine-tuning learn from.

    data = Views(open_source("photos/"), (ViewConfig(scale=(0.2, 1.0)),))

`Views` is a `Data` (mapet/task.py): which images a step sees, and what is drawn for each of their views, is a function
of (seed, step) alone, drawn for the whole global batch and then shared out. So any number of processes, data workers,
micro-batches and resumes gives the same pixels, bit for bit, with the same versions of Pillow and torchvision.

Images that cannot be read. Reading all of them before a run takes hours for a million files, and a run must not end at
step 90,000 for one damaged JPEG, so an image whose content cannot be decoded is replaced, with a warning, by the next
one that can be, label and all: the next in order, among those learned from, or among those held out. That follows from
the files alone, whose names and sizes are part of the fingerprint that a resumed run is checked by, so the same steps
give the same pixels again. What the system refuses (a file that is gone, a disk or network that fails) may be otherwise
a minute later: replacing that would silently learn other data. A file that cannot be read from the beginning is refused
by `check_model`; later it is a DataError, upon which the run saves what it has learned and ends, to go on from there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from mapet.checked import above, at_least, check_fields, fraction
from mapet.config import ModelConfig, Side
from mapet.data.cache import TokenCache
from mapet.data.images import ImageSource
from mapet.errors import ConfigError, DataError, FieldError
from mapet.task import Batch

if TYPE_CHECKING:
    from mapet.data.loader import Share

STAND_INS = 100
"""Images in a row that cannot be read before that is an error."""
RANDOM = frozenset(
    {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "uniform_", "normal_", "random_"}
)
"""What torch draws with."""

Strength = Annotated[float, at_least(0, 10)]
Area = Annotated[float, fraction(zero=False)]
Aspect = Annotated[float, above(0, 100)]


@dataclass(frozen=True)
class ViewConfig:
    """How one view of an image is made, in this order: crop, flip, jitter, distortion.

    As published: MAE scale=(0.2, 1.0); VQ-KD the defaults; fine-tuning and its like the defaults, with
    evaluation_crop=0.9 where 248 pixels are asked for, and what acts on whole batches (Mixup, CutMix) elsewhere; BEiT's
    linear probe interpolation="bilinear"; LUT two views, ViewConfig(crop="shifted") and ViewConfig(crop="shifted",
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_probability=0.8, distortion=True).
    """

    size: Side = 224
    """Side in pixels, of random views and of those to evaluate on."""
    crop: Literal["resized", "shifted"] = "resized"
    """resized: a random part of the image, see `scale` and `ratio` (RandomResizedCrop). shifted: nearly all of it, the
    shorter side resized to `size`, then a random square of what `padding` pixels, mirrored, make of it."""
    scale: tuple[Area, Area] = (0.08, 1.0)
    """Least and largest area of a resized crop, as a share of the image's."""
    ratio: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """Least and largest width of a resized crop, relative to its height."""
    padding: Annotated[int, at_least(0, 16384)] = 4
    """Pixels on each side, of a shifted crop; fewer than `size`."""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Pillow's, which smooths what it makes smaller."""
    flip: Annotated[float, fraction()] = 0.5
    """Probability of a horizontal flip."""
    brightness: Strength = 0.0
    """Largest relative change by the jitter; 0 for none. Brightness, contrast, saturation, hue come in random order."""
    contrast: Strength = 0.0
    """As brightness."""
    saturation: Strength = 0.0
    """As brightness."""
    hue: Annotated[float, at_least(0, 0.5)] = 0.0
    """Largest change, as a share of the circle of hues."""
    jitter_probability: Annotated[float, fraction()] = 1.0
    """Of any jitter at all."""
    distortion: bool = False
    """Whether one of grey, solarised and blurred (radius 0.1 to 2 pixels), each as likely, comes last."""
    evaluation_crop: Area = 0.875
    """Evaluation takes the centre: the shorter side is resized to size / evaluation_crop, rounded down. 0.875 makes 256
    pixels of 224, and 0.9 makes 248."""

    def __post_init__(self) -> None:
        check_fields(self, "view.")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise FieldError(f"view.{name}", f"view.{name} must be the smaller number first, got {low} {high}")
        if self.crop == "shifted" and self.padding >= self.size:
            raise FieldError("view.padding", f"view.padding must be below view.size {self.size}, got {self.padding}")

    @cached_property
    def transform(self) -> v2.Transform:
        """Of an RGB picture of any size to one of `size`, at random: draws from torch's generators."""
        size, resample = [self.size, self.size], v2.InterpolationMode(self.interpolation)
        if self.crop == "resized":
            steps: list[Any] = [v2.RandomResizedCrop(size, self.scale, self.ratio, resample)]
        else:
            steps = [v2.Resize(self.size, resample), v2.RandomCrop(size, self.padding, padding_mode="reflect")]
        steps.append(v2.RandomHorizontalFlip(self.flip))
        if any((self.brightness, self.contrast, self.saturation, self.hue)):
            jitter = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
            steps.append(v2.RandomApply([jitter], self.jitter_probability))
        if self.distortion:
            blur = v2.GaussianBlur(13, (0.1, 2.0))  # 13 pixels hold three standard deviations
            steps.append(v2.RandomChoice([v2.RandomGrayscale(1.0), v2.RandomSolarize(128, 1.0), blur]))
        return v2.Compose(steps)

    @cached_property
    def evaluation(self) -> v2.Transform:
        """The centre of an RGB picture; nothing is drawn."""
        resize = v2.Resize(int(self.size / self.evaluation_crop), v2.InterpolationMode(self.interpolation))
        return v2.Compose([resize, v2.CenterCrop(self.size)])

    def view(self, picture: Image.Image, seed: int | None) -> Tensor:
        """uint8 (3, size, size) of an RGB picture: the random view of this seed, or the centre for None."""
        if seed is None:
            return pil_to_tensor(self.evaluation(picture))
        with drawing_from(torch.Generator().manual_seed(seed)):
            return pil_to_tensor(self.transform(picture))


@dataclass(frozen=True)
class Views:
    """Random views of the images of a folder, a built-in set or a token cache (its crops), one or several of each."""

    images: ImageSource | TokenCache
    views: tuple[ViewConfig, ...] = (ViewConfig(),)
    """One for each view; all of the same size."""

    def __post_init__(self) -> None:
        if len(sizes := {view.size for view in self.views}) != 1:
            raise ConfigError(f"views of an image have one size, in pixels, got {sorted(sizes) or 'no view'}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Side of the views in pixels."""
        return self.views[0].size

    @property
    def image_bytes(self) -> int:
        """Of the views of one image, with its label."""
        return 3 * self.size**2 * len(self.views) + 16

    def fingerprint(self) -> str:
        """That of the images."""
        return self.images.fingerprint()

    def check_model(self, model: ModelConfig) -> None:
        """DataError unless the views have the model's size, and every file of a folder is there to be read."""
        if self.size != model.image_size:
            raise DataError(f"views are {self.size} pixels wide, and model.image_size is {model.image_size}")
        if (root := getattr(self.images, "root", None)) is None:
            return
        if refused := [name for name in self.images.names if not os.access(root / name, os.R_OK)]:
            raise DataError(
                f"{len(refused)} images of {root} are not there, or may not be read, such as {refused[0]}: allow that, "
                "or take them away"
            )

    def batch(self, ids: Tensor, share: Share, beat: Callable[[], None]) -> Batch:
        """Views of these images, by (seed, step) of `share`; of held-out images the centre, for every view.

        Returns:
            images: uint8 (b, 3, S, S) of one view, (b, views, 3, S, S) of several; ids: int64 (b,); labels: int64 (b,),
            where the images have labels.
        Raises:
            DataError: see the top of the file.
        """
        seeds = torch.randint(
            2**63 - 1, (share.images, len(self.views)), generator=share.rng.generator("views", "cpu")
        )[share.part].tolist()
        pixels = torch.empty(len(ids), len(self.views), 3, self.size, self.size, dtype=torch.uint8)
        taken = torch.empty(len(ids), dtype=torch.int64)
        for row, wanted in enumerate(ids.tolist()):
            taken[row], picture = self._picture(wanted, share)
            for column, view in enumerate(self.views):
                pixels[row, column] = view.view(picture, None if share.held_out else seeds[row][column])
            beat()
        batch = {"images": pixels.squeeze(1) if len(self.views) == 1 else pixels, "ids": taken}
        if self.images.labels is not None:
            batch["labels"] = torch.from_numpy(self.images.labels[taken.numpy()])
        return batch

    def _picture(self, index: int, share: Share) -> tuple[int, Image.Image]:
        """The image, or the next one that can be read; which one it is."""
        for _ in range(STAND_INS):
            try:
                return index, picture_of(self.images, index)
            except DataError as error:
                if may_pass(error):
                    raise
                last, index = error, following(index, share.among, len(self))
                warnings.warn(f"{error}; image {self.images.names[index]} is taken in its place", stacklevel=2)
        raise DataError(f"{STAND_INS} images in a row cannot be read, of the last: {last}") from last


def picture_of(images: ImageSource | TokenCache, index: int) -> Image.Image:
    """An image as 8-bit RGB. DataError naming it where it cannot be read."""
    if isinstance(images, ImageSource):
        return images.load(index)
    return to_pil_image(images.images([index])[0])


def may_pass(error: DataError) -> bool:
    """Whether an image may be readable a minute later: the system refused it, not the decoder."""
    cause = error.__cause__
    return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None)


def following(index: int, among: Tensor | None, images: int) -> int:
    """The image after this one, among those of `among` (int64, sorted) or all; after the last comes the first."""
    if among is None:
        return (index + 1) % images
    return int(among[int(torch.searchsorted(among, index, right=True)) % len(among)])


class _Drawing(TorchFunctionMode):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") in RANDOM:
            kwargs.setdefault("generator", self.generator)
        return function(*args, **kwargs)


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """In the block, this thread's torch draws from `generator` where no other one is given.

    torchvision's transforms know the global generator only, which a data worker must leave alone: the thread that makes
    batches where there is no worker shares it with the training.
    """
    with _Drawing(generator):
        yield
