"""Options of the command line, one dataclass per sub-command.

Nothing here imports torch, so that `mapet COMMAND --help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from mapet.checked import above, at_least, fraction
from mapet.config import (
    MODEL_PRESETS,
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
from mapet.objectives import OBJECTIVES
from mapet.recipes import RECIPES
from mapet.tokenizers import TOKENIZERS


def _wanted(metavar: str, hint: str = "") -> Any:
    """An option that is None where it is not given; `hint` says what then happens."""
    return arg(metavar=metavar, help_behavior_hint=f"({hint})" if hint else "")


@dataclass(frozen=True)
class Tokenize:
    """Turn images into a token cache: fit or load a tokenizer, encode every image; also under torchrun."""

    images: Annotated[str | None, _wanted("DIR|digits|photos[:TILE[:STRIDE]]")] = None
    """Folder of images, labelled by class sub-folders or not, or a built-in set."""
    output: Annotated[Path, arg(metavar="CACHE")] = Path("runs/cache")
    """Folder for the cache."""
    tokenizer: Annotated[str | None, _wanted("|".join(TOKENIZERS), "pixel, or the codebook's")] = None
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
class Start:
    """What the defaults of a run are."""

    recipe: Annotated[str, arg(metavar="|".join(RECIPES), help_behavior_hint="(default: none)")] = ""
    """One of the paper's runs to begin with; the options below then default to its values."""
    preset: Annotated[str, arg(name="model", metavar="|".join(MODEL_PRESETS), help_behavior_hint="(default: tiny)")] = (
        ""
    )
    """Width and heads of ViT-T, ViT-S or ViT-B; --model.width and --model.heads beside it are what counts."""
    method: Annotated[
        str, arg(name="objective", metavar="|".join(OBJECTIVES), help_behavior_hint="(default: mapet)")
    ] = ""
    """What is predicted from what. Each method has options of its own, which the help with it shows."""


@dataclass(frozen=True)
class Run(Start):
    """The configuration of a run, every field of it an option."""

    run: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Pretrain(Run):
    """Pre-train a vision transformer on a token cache, or go on with a run; also under torchrun."""

    gpus: Annotated[Count | None, arg(metavar="INT", help_behavior_hint="(default: those of torchrun)")] = None
    """GPUs that the run is meant for; another number of processes is refused."""
    fresh: Annotated[bool, FlagCreatePairsOff] = False
    """Whether to start again, setting the earlier run in the output folder aside, into before_1 there."""


@dataclass(frozen=True)
class Plan(Run):
    """Predict the memory of a step, by part, and choose micro-batch and recomputation; nothing is run."""

    gpus: Count = 1
    """GPUs that share a step."""
    gpu: Annotated[
        str | None, arg(metavar="V100|T4|A100|H100|H200|B200|'RTX 4090'", help_behavior_hint="(default: none)")
    ] = None
    """GPU whose speed to compute from its data sheet; its memory is the limit where none is given."""
    peak: Annotated[str | None, arg(metavar="312T", help_behavior_hint="(default: that of --gpu)")] = None
    """FLOP per second, in the run's precision, of a GPU that is not in the list; goes with --bandwidth."""
    bandwidth: Annotated[str | None, arg(metavar="2.0TB", help_behavior_hint="(default: that of --gpu)")] = None
    """Bytes per second of its memory."""
    interconnect: Annotated[str | None, arg(metavar="400Gb", help_behavior_hint="(default: none)")] = None
    """Bits (Gb) or bytes (GB) per second of one GPU's slowest link, which adds traffic and times of several GPUs."""
    images: Annotated[str, arg(metavar="1.28M")] = "1281167"
    """Images of an epoch, for --gpu, --peak and --interconnect."""
    images_per_second: Annotated[
        Annotated[float, above(0)] | None, arg(metavar="FLOAT", help_behavior_hint="(default: unknown)")
    ] = None
    """Images per second that one GPU trains on its own, measured, for --interconnect."""


@dataclass(frozen=True)
class Probe:
    """Measure frozen features on labelled images: kNN, the paper's linear probe and logistic regression."""

    checkpoint: Annotated[Path, arg(metavar="RUN|CHECKPOINT|TIMM")]
    """A run folder, one of its step_... folders, or an exported folder."""
    images: Annotated[str, arg(metavar="DIR|digits|CACHE")]
    """Folder with a sub-folder for every class, digits, or a labelled token cache. Whole centre squares are tested on;
    BEiT's evaluation takes the middle 224 of 256 pixels."""
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

EXAMPLES: dict[str, tuple[str, ...]] = {
    "tokenize": (
        "mapet tokenize --images DIR --output runs/cache",
        "mapet tokenize --images digits --image-size 28 --patch-size 7 --vocabulary 256 --output runs/digits",
    ),
    "pretrain": (
        "mapet pretrain --cache runs/cache --model tiny --batch 256 --epochs 100 --precision auto",
        "mapet pretrain --cache runs/cache --objective mim --masked 98 --optim.clip 1 --speed.compile",
        "mapet pretrain --recipe vit_base_kclip --gpu-memory 16GB",
    ),
    "plan": (
        "mapet plan --model base --precision bf16 --gpu-memory 16GB --batch 1024",
        "mapet plan --recipe vit_base_kclip --gpus 64 --interconnect 400Gb",
    ),
    "probe": ("mapet probe --checkpoint runs/pretrain --images DIR --baselines",),
    "codebook": ("mapet codebook --cache runs/cache",),
    "export": ("mapet export --checkpoint runs/pretrain --output runs/pretrain/timm",),
    "demo": ("mapet demo --output runs/demo",),
    "doctor": ("mapet doctor --cache runs/cache --run runs/pretrain",),
}
"""Whole command lines that work, for --help."""
