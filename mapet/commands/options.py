"""Options of the command line, one dataclass per sub-command.

Nothing here imports torch, so that `mapet COMMAND --help` is quick.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from mapet.checked import above, at_least, check_fields, fraction
from mapet.commands.settings import as_text, settings, value_of
from mapet.config import (
    BatchSize,
    Count,
    CountOrNone,
    PositiveRate,
    Rows,
    RunConfig,
    Seed,
    Side,
    Vocabulary,
    Workers,
)
from mapet.errors import FieldError

FIELD_OF = {
    "cache": "data.cache",
    "output": "train.output",
    "objective": "objective.name",
    "cut": "objective.cut",
    "epochs": "optim.epochs",
    "warmup_epochs": "optim.warmup_epochs",
    "batch": "optim.global_batch",
    "lr": "optim.lr",
    "precision": "train.precision",
    "device": "train.device",
    "parallel": "train.parallel",
    "micro_batch": "train.micro_batch",
    "workers": "data.workers",
    "seed": "train.seed",
    "save_every": "train.save_every",
    "max_steps": "train.max_steps",
    "gpu_memory": "train.gpu_memory",
    "budget": "train.budget",
}
"""Options of `mapet pretrain` that are short for a field of RunConfig."""


def check_options(options: Any) -> None:
    """FieldError, naming the option as typed, unless the values have their types and ranges, and numbers are finite."""
    try:
        check_fields(options)
    except FieldError as error:
        short_for = FIELD_OF.get(error.name, "") if hasattr(options, "set") else ""
        raise as_typed(error, error.name, short_for) from None


def as_typed(error: FieldError, option: str, short_for: str = "") -> FieldError:
    """The error of a field with the option's name before it: --batch-size, or --lr (optim.lr)."""
    name = f"--{option.replace('_', '-')}" + (f" ({short_for})" if short_for else "")
    return FieldError(error.name, f"{name}{str(error).removeprefix(error.name)}")


def in_options(text: str, kind: type) -> str:
    """A message about a run with its fields as they are typed in a command, `--lr` or `--set optim.clip`."""
    typed = {name: f"--{option.replace('_', '-')}" for option, name in FIELD_OF.items() if hasattr(kind, option)}
    names = "|".join(re.escape(name) for name in sorted(settings(), key=len, reverse=True))
    return re.sub(
        rf"(?<![\w./(-])(?<!--set )({names})\b(?![/-]|\.\w)",
        lambda found: typed.get(found[0], f"--set {found[0]}"),
        text,
    )


def _wanted(metavar: str, hint: str = "") -> Any:
    """An option that is None where it is not given; `hint` says what then happens."""
    return arg(metavar=metavar, help_behavior_hint=f"({hint})" if hint else "")


def _short_for(option: str) -> Any:
    """An option that stands for a field of RunConfig, with the field's name and default in its help."""
    name = FIELD_OF[option]
    return _wanted(settings()[name].allowed, f"{name}, {as_text(value_of(RunConfig(), name))}")


@dataclass(frozen=True)
class Tokenize:
    """Turn images into a token cache: fit or load a tokenizer, encode every image; also under torchrun."""

    images: Annotated[str | None, _wanted("DIR|digits|photos[:TILE[:STRIDE]]")] = None
    """Folder of images, labelled by class sub-folders or not, or a built-in set."""
    output: Annotated[Path, arg(metavar="CACHE")] = Path("runs/cache")
    """Folder for the cache."""
    tokenizer: Annotated[Literal["pixel", "kclip"] | None, _wanted("pixel|kclip", "pixel, or the codebook's")] = None
    """k-means over pixels or over CLIP RN50x64 features."""
    image_size: Annotated[Side | None, _wanted("INT", "224, or the codebook's")] = None
    """Side of the crops in pixels."""
    patch_size: Annotated[Side | None, _wanted("INT", "16, or the codebook's")] = None
    """Side of a patch in pixels."""
    vocabulary: Annotated[Vocabulary | None, _wanted("INT", "8192, or the codebook's")] = None
    """Codebook entries."""
    codebook: Annotated[Path | None, _wanted("FOLDER|NPY", "CACHE_tokenizer")] = None
    """Saved tokenizer, or centroids, or a new folder for one."""
    weights: Annotated[Path | None, _wanted("FILE", "found in caches or on the hub")] = None
    """Weights of CLIP RN50x64, for kclip."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, _wanted("TYPE", "fp16 on a GPU, else fp32")] = None
    """fp32, fp16 or bf16, of the network of kclip."""
    compile: Annotated[bool, arg(help_behavior_hint="")] = False
    """Compile the network of kclip."""
    fit_images: CountOrNone = 0
    """Images to fit the codebook on, drawn at random; 0 for all."""
    fit_iterations: Count = 20
    """k-means iterations."""
    fit_redos: Count = 5
    """k-means starts, of which the best is kept."""
    features_dir: Annotated[Path | None, _wanted("DIR", "CACHE_features if above 4 GB")] = None
    """Folder for the features of the fit."""
    fit_init: Annotated[Literal["random", "k-means++"], arg(metavar="NAME")] = "random"
    """How k-means starts: random or k-means++."""
    fit_tolerance: Annotated[float, fraction(one=False)] = 0.0
    """Relative change of the objective that ends a start early."""
    fit_patches: Count = 512
    """Patches per codebook entry to fit on at most, drawn at random."""
    fit_save_every: Annotated[float, at_least(0)] = 60.0
    """Seconds between saves of an unfinished fit; 0 for none."""
    fit: Annotated[bool, arg(help_behavior_hint="")] = False
    """Only fit the tokenizer and save it; make no cache."""
    import_tokens: Annotated[tuple[Path, ...], arg(metavar="FILE...", help_behavior_hint="")] = ()
    """Token files of the official code, in order, or a folder; needs --csv, --root."""
    csv: Annotated[Path | None, _wanted("FILE")] = None
    """The official list of images (path,class) that the token files belong to."""
    root: Annotated[Path | None, _wanted("DIR")] = None
    """The folder its paths are relative to."""
    class_names: Annotated[Path | None, _wanted("NPY")] = None
    """label_encoder_classes.npy of the official code."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: Workers = 2
    """Processes that decode images, for each GPU."""
    patience: Annotated[float, above(0, 1e6)] = 20.0
    """Seconds that an image may take."""
    batch_size: BatchSize = 64
    """Images per batch."""
    shard_images: CountOrNone = 0
    """Images of a shard, the unit of resuming; 0 for about 1024."""
    max_skipped: Annotated[float, fraction()] = 0.01
    """Part of the images that may be unreadable; they are listed."""
    seed: Seed = 1234
    """Of the fit."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace the cache, and fit a new tokenizer unless --codebook is given."""


@dataclass(frozen=True)
class Pretrain:
    """Pre-train a vision transformer on a token cache, or go on with a run; also under torchrun."""

    recipe: Annotated[str | None, _wanted("NAME")] = None
    """Begin with vit_tiny_kclip, vit_small_kclip or vit_base_kclip, the paper's runs."""
    model: Annotated[Literal["tiny", "small", "base"] | None, _wanted("tiny|small|base", "tiny")] = None
    """Width and heads of ViT-T, ViT-S or ViT-B."""
    cache: Annotated[Path | None, _short_for("cache")] = None
    """Made by mapet tokenize."""
    output: Annotated[Path | None, _short_for("output")] = None
    """Folder for checkpoints and metrics."""
    objective: Annotated[Literal["mapet", "pim", "mim"] | None, _short_for("objective")] = None
    """What is predicted from what."""
    cut: Annotated[int | None, _short_for("cut")] = None
    """Tokens that are not predicted."""
    epochs: Annotated[int | None, _short_for("epochs")] = None
    """Passes over the images."""
    warmup_epochs: Annotated[int | None, _short_for("warmup_epochs")] = None
    """Of them, with a rising learning rate."""
    batch: Annotated[int | None, _short_for("batch")] = None
    """Images of a step, over all processes."""
    lr: Annotated[float | None, _short_for("lr")] = None
    """Peak learning rate."""
    precision: Annotated[Literal["fp32", "bf16", "fp16", "auto"] | None, _short_for("precision")] = None
    """Of the forward pass; auto: bf16 on a GPU that has it, fp16 on older ones, fp32 on a CPU."""
    device: Annotated[str | None, _short_for("device")] = None
    """auto, cpu, cuda or cuda:N."""
    parallel: Annotated[Literal["ddp", "fsdp"] | None, _short_for("parallel")] = None
    """With several processes: weights and optimizer whole in each (ddp), or shared out (fsdp)."""
    micro_batch: Annotated[int | None, _short_for("micro_batch")] = None
    """Images of a forward pass and process; 0 for all of a step."""
    workers: Annotated[int | None, _short_for("workers")] = None
    """Processes that read the cache."""
    seed: Annotated[int | None, _short_for("seed")] = None
    """Of everything random."""
    save_every: Annotated[int | None, _short_for("save_every")] = None
    """Steps between checkpoints."""
    max_steps: Annotated[int | None, _short_for("max_steps")] = None
    """Stop after so many steps; 0 for never."""
    gpu_memory: Annotated[str | None, _wanted("16GB", "all of the GPU's")] = None
    """Most memory of a GPU to take; sets micro-batch and recomputation that fit, where they are not given."""
    auto_batch: Annotated[bool, arg(help_behavior_hint="")] = False
    """When memory runs out, halve the micro-batch and go on with the same step."""
    budget: Annotated[str | None, _wanted("24h")] = None
    """Measure for a minute, then set the epochs so that the run ends in time."""
    gpus: Annotated[Count | None, _wanted("INT", "those of torchrun")] = None
    """GPUs that the run is meant for; another number of processes is refused."""
    set: Annotated[tuple[str, ...], UseAppendAction, _wanted("SECTION.FIELD=VALUE", "repeatable")] = ()
    """Any field of the configuration; the options above are short for some of them."""
    fresh: Annotated[bool, arg(help_behavior_hint="")] = False
    """Start again, setting the earlier run in --output aside, into before_1 there."""
    list_options: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print every field, its value with the options given, and what it means; then stop."""


@dataclass(frozen=True)
class Plan:
    """Predict the memory of a step, by part, and choose micro-batch and recomputation; nothing is run."""

    recipe: Annotated[str | None, _wanted("NAME")] = None
    """Begin with one of the paper's runs, as mapet pretrain does."""
    model: Annotated[Literal["tiny", "small", "base"] | None, _wanted("tiny|small|base", "tiny")] = None
    """Width and heads of ViT-T, ViT-S or ViT-B."""
    objective: Annotated[Literal["mapet", "pim", "mim"] | None, _short_for("objective")] = None
    """What is predicted from what."""
    cut: Annotated[int | None, _short_for("cut")] = None
    """Tokens that are not predicted."""
    precision: Annotated[Literal["fp32", "bf16", "fp16", "auto"] | None, _short_for("precision")] = None
    """Of the forward pass; auto: bf16 on a GPU that has it, fp16 on older ones, fp32 on a CPU."""
    parallel: Annotated[Literal["ddp", "fsdp"] | None, _short_for("parallel")] = None
    """With several processes: weights and optimizer whole in each (ddp), or shared out (fsdp)."""
    micro_batch: Annotated[int | None, _short_for("micro_batch")] = None
    """Images of a forward pass; the largest that fits where it is not given."""
    global_batch: Annotated[BatchSize | None, _wanted("INT", "optim.global_batch, 2048")] = None
    """Images of a step, over all GPUs."""
    gpus: Count = 1
    """GPUs that share a step."""
    gpu_memory: Annotated[str | None, _wanted("16GB", "no limit")] = None
    """Memory of one GPU: GB is 10^9 bytes, GiB 2^30."""
    gpu: Annotated[
        Literal["V100", "T4", "A100", "H100", "H200", "B200", "RTX 4090"] | None, _wanted("V100|T4|A100|...")
    ] = None
    """Adds images per second on this GPU, computed from its data sheet; its memory is the limit where none is given."""
    peak: Annotated[str | None, _wanted("312T")] = None
    """FLOP per second of another GPU, in the precision of the run, for the same."""
    bandwidth: Annotated[str | None, _wanted("2.0TB")] = None
    """Bytes per second of its memory."""
    interconnect: Annotated[str | None, _wanted("400Gb")] = None
    """Bits (Gb) or bytes (GB) per second of one GPU's slowest link: adds traffic and times of several GPUs."""
    images: Annotated[str, arg(metavar="1.28M")] = "1281167"
    """Images of an epoch, for --gpu and --interconnect."""
    images_per_second: Annotated[Annotated[float, above(0)] | None, _wanted("FLOAT", "unknown")] = None
    """What one GPU trains on its own, measured, for --interconnect."""
    set: Annotated[tuple[str, ...], UseAppendAction, _wanted("SECTION.FIELD=VALUE", "repeatable")] = ()
    """Any field of the configuration."""


@dataclass(frozen=True)
class Probe:
    """Measure frozen features on labelled images: kNN, the paper's linear probe and logistic regression."""

    checkpoint: Annotated[Path, arg(metavar="RUN|CHECKPOINT|TIMM")]
    """A run folder, one of its step_... folders, or an exported folder."""
    images: Annotated[str, arg(metavar="DIR|digits|CACHE")]
    """Folder with a sub-folder for every class, digits, or a labelled token cache."""
    test_images: Annotated[str | None, _wanted("DIR|CACHE", "a part of --images")] = None
    """Images to test on."""
    test_fraction: Annotated[float, fraction(one=False, zero=False)] = 0.2
    """That part, drawn class by class."""
    output: Path = Path("runs/probe")
    """Folder for scores.json and the frozen features, which a next probe reuses."""
    methods: Annotated[tuple[Literal["knn", "linear", "logistic"], ...], arg(metavar="knn linear logistic")] = (
        "knn",
        "linear",
        "logistic",
    )
    """What to measure; logistic regression is slow on large sets."""
    baselines: Annotated[bool, arg(help_behavior_hint="")] = False
    """Also score the same network at random initialisation, and raw pixels."""
    ema: Annotated[bool, arg(help_behavior_hint="")] = False
    """Take the moving average of the weights."""
    labels_per_class: CountOrNone = 10
    """Also measure with so many labels of every class; 0 leaves that out."""
    neighbours: Count = 20
    """k of kNN, which is also measured with k = 1."""
    views: CountOrNone = 0
    """Train the linear probe on so many random crops of each image; 0 for the centre."""
    epochs: Count = 50
    """Of the linear probe."""
    batch: BatchSize = 1024
    """Of the linear probe; take a smaller one on small sets."""
    lr: PositiveRate = 4e-3
    """Of the linear probe."""
    batch_size: BatchSize = 256
    """Images of a forward pass."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: Seed = 0
    """Of the split, the labels drawn and the probe."""


@dataclass(frozen=True)
class Codebook:
    """Report on the codebook behind a token cache: its usage, what entries look like, and their classes."""

    cache: Annotated[Path, arg(metavar="CACHE")]
    """Made by mapet tokenize."""
    output: Annotated[Path, arg(metavar="DIR")] = Path("runs/codebook")
    """Folder for report.md, the pictures and the tables."""
    codebook: Annotated[Path | None, _wanted("FOLDER", "CACHE_tokenizer")] = None
    """The tokenizer, to find entries that repeat another."""
    entries: Annotated[tuple[int, ...], arg(metavar="ID...", help_behavior_hint="")] = ()
    """Entries to draw, besides the most and the least used."""
    rows: Rows = 10
    """Entries of a picture."""
    floor: Count = 20
    """Tokens that an entry has in a class, at least, to be tied to it."""
    seed: Seed = 0
    """Picks the patches that are drawn."""


@dataclass(frozen=True)
class Export:
    """Write pre-trained weights as a folder that timm.create_model loads, and check it."""

    checkpoint: Annotated[Path, arg(metavar="RUN|CHECKPOINT")]
    """A run folder, or one of its step_... folders."""
    output: Annotated[Path, arg(metavar="DIR")]
    """The folder; an earlier export of mapet there is replaced."""
    pool: Literal["avg", "token"] = "avg"
    """What the model returns: the mean of the patches, or the class token."""
    name: str = "mapet"
    """What config.json calls the weights."""
    ema: Annotated[bool, arg(help_behavior_hint="")] = False
    """Take the moving average of the weights."""


@dataclass(frozen=True)
class Demo:
    """The whole job on images that ship with Python packages: minutes on a CPU, and no download."""

    output: Path = Path("runs/demo")
    """Folder for report.md, the pictures and the exported model."""
    seeds: Annotated[int, at_least(1, 1000)] = 3
    """Pre-training runs, for mean and spread."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    quick: Annotated[bool, arg(help_behavior_hint="")] = False
    """A few steps only, to see that everything runs; the numbers then mean nothing."""


@dataclass(frozen=True)
class Doctor:
    """Say what this machine can run, and why not the rest; verify a cache or a run."""

    cache: Annotated[Path | None, _wanted("DIR")] = None
    """A token cache to verify, byte by byte."""
    run: Annotated[Path | None, _wanted("DIR")] = None
    """A run whose checkpoints to verify."""


COMMANDS: dict[str, type] = {
    "tokenize": Tokenize,
    "pretrain": Pretrain,
    "plan": Plan,
    "probe": Probe,
    "codebook": Codebook,
    "export": Export,
    "demo": Demo,
    "doctor": Doctor,
}
"""Sub-commands by name; `mapet.commands.NAME.run` takes the options."""
