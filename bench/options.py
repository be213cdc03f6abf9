"""What every suite is told: sizes, dtype, device. `python -m bench run` and `pytest bench/` share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import torch

from bench import records
from mapet.config import ModelConfig
from mapet.units import parse_bytes

SuiteName = Literal[
    "kernels", "attention", "step", "ablation", "pretrain", "tokenize", "kmeans", "kmeans_fit", "curves"
]
SUITES: tuple[SuiteName, ...] = get_args(SuiteName)
QUICK: tuple[SuiteName, ...] = ("kernels", "attention", "step", "pretrain", "tokenize", "kmeans")
"""Suites that take minutes on a CPU; they run where none is named."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAPER_TOKENS, PAPER_CUT = 197, 50


@dataclass(frozen=True)
class Options:
    """Suites of contests, with common options.

    Several values of an option make a contest each: --image-size 112 224 448 is a sweep.

    Attributes:
        suite: one or more; when not given all but ablation, kmeans_fit and curves.
        model: ViT-T, ViT-S, ViT-B.
        batch: images of a step; when not given 8 on a CPU and 128 on a GPU.
        dtype: of the forward pass; weights are fp32.
        device: cuda, cuda:N or cpu; a GPU where there is one.
        image_size: side of the images in pixels.
        patch_size: side of a patch in pixels.
        cut: tokens that are not predicted, of 197; other lengths get the same share.
        preset: of the suite attention. "step": the sizes of the steps asked for; "targets": 3072 images x heads at N =
            197, other lengths, cuts and numbers of heads; "tuned_flex": the same shape beside FlexAttention with tuned
            tiles, which takes minutes to compile.
        ways: only these ways, by their names in a record, and what their times are divided by; all when not given.
        compile: measure the compiled step as well, which takes a minute or more to compile.
        backend: of attention in our ways of the step and of pre-training, and of k-means, such as cuda.
        gpu_memory: cap on the memory of each way of the step, such as 16GiB; a way whose batch does not fit takes it in
            micro-batches.
        jitter: colour jitter of the step and of pre-training, for all ways alike.
        workers: processes that read data.
        images: of the pretrain and tokenize suites; when not given small numbers on a CPU.
        repeats: samples of each way; 0 for 5 on a CPU and 20 on a GPU. Slow ways get fewer.
        seconds: that the samples of one way may take; 0 for 20 on a CPU and 3 on a GPU.
        time_limit: seconds after which nothing new starts, and what there is becomes the record; 0 for none.
        output: folder for the records.
    """

    suite: tuple[SuiteName, ...] = QUICK
    model: tuple[Literal["tiny", "small", "base"], ...] = ("tiny",)
    batch: tuple[int, ...] = ()
    dtype: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("bf16",)
    device: str | None = None
    image_size: tuple[int, ...] = (224,)
    patch_size: tuple[int, ...] = (16,)
    cut: int = PAPER_CUT
    preset: Literal["step", "targets", "tuned_flex"] = "step"
    ways: tuple[str, ...] = ()
    compile: bool = True
    backend: str = "auto"
    gpu_memory: str = ""
    jitter: float = 0.4
    workers: int = 2
    images: int = 0
    repeats: int = 0
    seconds: float = 0.0
    time_limit: float = 0.0
    output: Path = records.RESULTS


@dataclass(frozen=True)
class Sizes:
    """One combination of what varies."""

    model: ModelConfig
    model_name: str
    batch: int
    dtype: str
    cut: int

    @property
    def name(self) -> str:
        """Tells it from the others of a run, and stays the same from run to run."""
        model = self.model
        patches = "" if model.patch_size == 16 else f"/{model.patch_size}"
        size = "" if model.image_size == 224 and not patches else f" {model.image_size}{patches} px"
        cut = "" if self.cut == scaled_cut(PAPER_CUT, model.tokens) else f" cut {self.cut}"
        return f"{self.model_name} {self.dtype} batch {self.batch}{size}{cut}"

    def record(self) -> dict[str, int | str]:
        """As a record tells it."""
        model = self.model
        return {
            "model": self.model_name, "batch": self.batch, "tokens": model.tokens, "cut": self.cut,
            "image_size": model.image_size, "patch_size": model.patch_size,
        }  # fmt: skip


def chosen_device(wanted: str | None) -> torch.device:
    """The device to measure on; ValueError where it is not there, or neither a CPU nor a CUDA device."""
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA device here; use --device cpu")
    return device


def check(options: Options, device: torch.device) -> None:
    """ValueError for options that cannot work here; the text says what can."""
    for name in ("suite", "model", "dtype", "image_size", "patch_size"):
        if not getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} needs at least one value")
    if any(batch < 1 for batch in options.batch):
        raise ValueError(f"--batch must be at least 1, got {min(options.batch)}")
    if options.gpu_memory and device.type != "cuda":
        raise ValueError("--gpu-memory caps the memory of a GPU; this run is on a CPU: leave it out")
    if options.gpu_memory:
        parse_bytes(options.gpu_memory)
    for name in ("workers", "images", "repeats", "seconds", "time_limit"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(options, name)}")


def scaled_cut(cut: int, tokens: int) -> int:
    """`cut` of 197 tokens as the same share of `tokens`, in [1, tokens - 1]."""
    return min(tokens - 1, max(1, round(cut * tokens / PAPER_TOKENS)))


def combinations(options: Options, device: torch.device) -> Iterator[Sizes]:
    """Every combination of model, dtype, image size, patch size and batch, in this order."""
    batches = options.batch or (128 if device.type == "cuda" else 8,)
    for name, dtype, image_size, patch_size, batch in product(
        options.model, options.dtype, options.image_size, options.patch_size, batches
    ):
        model = ModelConfig.preset(name, image_size=image_size, patch_size=patch_size)
        yield Sizes(model, name, batch, dtype, scaled_cut(options.cut, model.tokens))
