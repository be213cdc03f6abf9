"""Configuration of a run: nested dataclasses, checked when they are made.

A run is a pure function of a `RunConfig`. A default is the paper's value (Table 8) unless its comment says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mapet.checked import SEED, above, at_least, check_fields, conform, fraction, hints
from mapet.errors import ConfigError, FieldError
from mapet.objectives import OBJECTIVES, objective, options
from mapet.units import parse_bytes, parse_duration

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionChoice = Literal[Precision, "auto"]
Recompute = Literal["none", "cheap", "blocks"]
RecomputeChoice = Literal["auto", Recompute]
Parallel = Literal["ddp", "fsdp"]

Side = Annotated[int, at_least(1, 16384)]
"""Of an image or a patch, in pixels."""
Vocabulary = Annotated[int, at_least(1, 65536)]
"""Tokens are stored as uint16."""
Count = Annotated[int, at_least(1, 10**9)]
CountOrNone = Annotated[int, at_least(0, 10**9)]
"""0 has a meaning of its own."""
Rate = Annotated[float, at_least(0, 1e3)]
PositiveRate = Annotated[float, above(0, 1e3)]
BatchSize = Annotated[int, at_least(1, 2**22)]
Workers = Annotated[int, at_least(0, 1024)]
Seed = Annotated[int, SEED]
Rows = Annotated[int, at_least(1, 1000)]
"""Of a picture."""

MAY_CHANGE = "a resumed run may set it differently"
"""Marks such a field in its annotation. Any other field changes what is learned."""


@dataclass(frozen=True)
class Typed:
    """How a field is typed on the command line, beside --section.field; here no package for that is needed."""

    short: str = ""
    """An option of one word."""
    example: str = ""
    """What is typed after it, where its type does not say."""


def short(option: str) -> Typed:
    """A field's option of one word."""
    return Typed(short=option)


def example(value: str) -> Typed:
    """What is typed for a field whose type is text."""
    return Typed(example=value)


def _require(condition: bool, field: str, rest: str) -> None:
    if not condition:
        raise FieldError(field, f"{field} {rest}")


@dataclass(frozen=True)
class ModelConfig:
    """Vision transformer and prediction head (paper, Table 8). The defaults are ViT-T/16 at 224 pixels."""

    image_size: Side = 224
    """Side of the images in pixels."""
    patch_size: Side = 16
    """Side of a patch in pixels; every patch is a token."""
    width: Annotated[int, at_least(1, 65536)] = 192
    """Numbers in a token."""
    depth: Annotated[int, at_least(1, 1024)] = 12
    """Transformer blocks."""
    heads: Annotated[int, at_least(1, 1024)] = 3
    """Attention heads, whose number divides the width."""
    mlp_ratio: Annotated[float, above(0, 64)] = 4.0
    """Hidden width of the MLP, relative to the width."""
    class_token: bool = True
    """Whether a class token comes first; it counts as a token, and is never predicted."""
    layer_scale: Annotated[float, at_least(0, 1e3)] = 0.1
    """Initial factor on the output of every attention and MLP, learned from there."""
    drop_path: Annotated[float, fraction(one=False)] = 0.1
    """Stochastic depth of the last block, rising from 0 in the first."""
    vocabulary: Vocabulary = 8192
    """Codebook entries of the tokenizer."""
    norm_eps: Annotated[float, above(0, 1)] = 1e-6
    """What LayerNorm adds to the variance; timm's models allow no other."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        _require(
            self.image_size % self.patch_size == 0,
            "model.image_size",
            f"{self.image_size} is not divisible by model.patch_size {self.patch_size}",
        )
        _require(self.width % self.heads == 0, "model.heads", f"{self.heads} does not divide model.width {self.width}")
        _require(
            int(self.width * self.mlp_ratio) >= 1,
            "model.mlp_ratio",
            f"{self.mlp_ratio} leaves the MLP no width: model.width is {self.width}",
        )
        _require(
            self.tokens >= 2,
            "model.patch_size",
            f"{self.patch_size} leaves one token of an image of {self.image_size} pixels: make it smaller, 2 are the "
            "least",
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches in an image, P."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Content tokens in an image, N: the patches, and the class token where there is one."""
        return self.patches + int(self.class_token)

    @property
    def head_size(self) -> int:
        """Numbers in one attention head."""
        return self.width // self.heads

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """ViT-T, ViT-S or ViT-B of the paper by name ("tiny", "small", "base"), with any field changed."""
        if name not in MODEL_PRESETS:
            raise ConfigError(f"unknown model {name!r}; the presets are {', '.join(MODEL_PRESETS)}")
        return cls(**{**MODEL_PRESETS[name], **changes})


MODEL_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "heads": 3},
    "small": {"width": 384, "heads": 6},
    "base": {"width": 768, "heads": 12},
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """Options of a pre-training method. Each method has its own, beside its Task in mapet/objectives/."""

    name: str
    """Name of the method, which says what is predicted from what (paper, sections 3 and 4.1, Table 1)."""

    def __post_init__(self) -> None:
        check_fields(self, "objective.")

    def check_model(self, model: ModelConfig) -> None:
        """FieldError for what does not go with the model's sizes."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokenised images are, and how they are fed."""

    cache: Annotated[Path, MAY_CHANGE, short("--cache")] = Path("runs/cache")
    """Token cache that `mapet tokenize` made; it may move, but a resumed run needs the same content."""
    workers: Annotated[Workers, MAY_CHANGE, short("--workers")] = 2
    """Processes that read images ahead; with 0 the run reads them itself."""
    patience: Annotated[float, above(0, 1e6), MAY_CHANGE] = 20.0
    """Seconds without progress after which a process that reads images counts as stalled, and the run ends."""
    color_jitter: Annotated[float, fraction()] = 0.4
    """Largest relative change of brightness, contrast and saturation, drawn per image; 0 turns it off."""
    held_out: Annotated[float, fraction(one=False)] = 0.0
    """Share of the images that is not learned from: loss and metrics on it are computed after every epoch. Which images
    is drawn from the seed, at least one where this is not 0. The paper trains on all."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule (paper, Table 8)."""

    epochs: Annotated[Count, short("--epochs")] = 300
    """Length of the schedule in passes over the images, the warm-up included."""
    global_batch: Annotated[BatchSize, short("--batch")] = 2048
    """Images of an optimizer step, over all processes and accumulated micro-batches."""
    lr: Annotated[PositiveRate, short("--lr")] = 1.5e-3
    """Peak learning rate."""
    min_lr: Rate = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_lr: Rate = 1e-6
    """Learning rate at the start of the linear warm-up."""
    warmup_epochs: Annotated[CountOrNone, short("--warmup-epochs")] = 10
    """Epochs with a rising learning rate."""
    cooldown_epochs: CountOrNone = 0
    """Epochs at the smallest rate after the cosine; the official code runs 10, which the paper does not mention."""
    schedule_per: Literal["step", "epoch"] = "step"
    """How often the learning rate changes: per step, or per epoch, as in the official code, which is less smooth."""
    weight_decay: Rate = 0.05
    """Weight decay, of all but biases, norms, positions and the class token."""
    beta1: Annotated[float, fraction(one=False)] = 0.9
    """Decay of AdamW's mean of the gradients."""
    beta2: Annotated[float, fraction(one=False)] = 0.999
    """Decay of AdamW's mean of their squares."""
    eps: Annotated[float, above(0, 1e3)] = 1e-8
    """What AdamW adds to the root of that mean."""
    clip: Annotated[float, at_least(0)] = 3.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        check_fields(self, "optim.")
        _require(
            self.warmup_epochs <= self.epochs,
            "optim.warmup_epochs",
            f"must be in [0, epochs = {self.epochs}], got {self.warmup_epochs}"
            + ", the default" * (self.warmup_epochs == OptimConfig.warmup_epochs),
        )


@dataclass(frozen=True)
class TrainConfig:
    """How the loop runs: none of this changes what is learned, except precision and ema."""

    output: Annotated[Path, MAY_CHANGE, short("--output")] = Path("runs/pretrain")
    """Folder for checkpoints and metrics."""
    seed: Annotated[Seed, short("--seed")] = 0
    """Seed of everything random: weights, order, permutations, drop-path, colour jitter."""
    device: Annotated[str, MAY_CHANGE, example("NAME"), short("--device")] = "auto"
    """Device of the run: auto, cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    precision: Annotated[PrecisionChoice, short("--precision")] = "fp32"
    """Precision of the forward pass; weights stay fp32, and fp16 scales the loss. auto takes bf16 on a GPU of compute
    capability 8.0 or newer, fp16 on an older one and fp32 on a CPU; a checkpoint holds what it took."""
    parallel: Annotated[Parallel, MAY_CHANGE, short("--parallel")] = "ddp"
    """How several processes share a run: ddp keeps all weights and the optimizer's state in each, fsdp shares them out
    (FSDP2, block by block), for models that are large beside the memory of a GPU. What is learned is the same."""
    micro_batch: Annotated[int, at_least(0, 2**22), MAY_CHANGE, short("--micro-batch")] = 0
    """Images of a forward pass and process; 0 means all of the process's share of a step, or with a limit on memory the
    most that fit."""
    recompute: Annotated[RecomputeChoice, MAY_CHANGE] = "auto"
    """What the backward pass computes again instead of keeping it: nothing, norms and GELU (cheap), or all of every
    block (blocks). It takes less memory and more time, for the same gradients. auto is none, or with a limit on memory
    the fastest that fits."""
    backend: Annotated[str, MAY_CHANGE, example("NAME")] = "auto"
    """Attention backend of mapet_kernels, such as sdpa, triton, flash or cuda; auto takes the fastest that runs."""
    ema_decay: Annotated[float, fraction(one=False)] = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none, and the paper keeps none."""
    save_every: Annotated[Count, MAY_CHANGE, short("--save-every")] = 1000
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep: Annotated[Count, MAY_CHANGE] = 2
    """Checkpoints to keep, the newest ones."""
    resume: Annotated[bool, MAY_CHANGE] = True
    """Whether to go on from the newest valid checkpoint in the output folder, where there is one."""
    gpu_memory: Annotated[str, MAY_CHANGE, example("16GB"), short("--gpu-memory")] = ""
    """Most memory to take of a GPU, in GB (10^9 bytes) or GiB (2^30)."""
    auto_batch: Annotated[bool, MAY_CHANGE, short("--auto-batch")] = False
    """Whether to halve the micro-batch when memory runs out, and go on with the same step."""
    budget: Annotated[str, MAY_CHANGE, example("24h"), short("--budget")] = ""
    """Time for the run from its first start; a measurement then sets the epochs and the warm-up, which stay so."""
    max_steps: Annotated[CountOrNone, MAY_CHANGE, short("--max-steps")] = 0
    """Optimizer steps in all after which to stop, with a checkpoint; 0 means the end of the last epoch."""
    log_every: Annotated[Count, MAY_CHANGE] = 10
    """Optimizer steps between reports."""
    trackers: Annotated[tuple[Literal["wandb", "trackio"], ...], MAY_CHANGE, example("wandb|trackio")] = ()
    """Services to report to as well; metrics.jsonl and TensorBoard are written in any case."""
    deterministic: Annotated[bool, MAY_CHANGE] = False
    """Whether to use only algorithms that give the same bits every time, which is slower on a GPU."""

    @property
    def recomputed(self) -> Recompute:
        """What is recomputed where no limit on memory decides."""
        return "none" if self.recompute == "auto" else self.recompute

    def __post_init__(self) -> None:
        check_fields(self, "train.")
        for name, parse in (("gpu_memory", parse_bytes), ("budget", parse_duration)):
            if text := getattr(self, name):
                try:
                    parse(text)
                except ConfigError as error:
                    raise FieldError(f"train.{name}", f"train.{name}: {error}") from None


@dataclass(frozen=True)
class SpeedConfig:
    """What makes a step faster on some machines. None of it changes what is learned beyond rounding, except fp8."""

    compile: Annotated[bool, MAY_CHANGE] = False
    """Whether to fuse the elementwise work (additions, norms, GELU, drop-path) by torch.compile."""
    skip_dropped: Annotated[bool, MAY_CHANGE] = True
    """Whether stochastic depth leaves out the work of dropped images. If not, or with compile or cuda_graphs, whose
    shapes must stay the same, it multiplies by zero."""
    cuda_graphs: Annotated[bool, MAY_CHANGE] = False
    """Whether to record the micro-batch's forward and backward pass once and replay them, which is for small models,
    whose kernels are shorter than it takes to launch them. It needs a GPU and one process."""
    fp8: bool = False
    """Whether the blocks multiply matrices in fp8 (package torchao, compute capability 8.9 or newer), which changes the
    rounding."""

    def __post_init__(self) -> None:
        check_fields(self, "speed.")


@dataclass(frozen=True)
class RunConfig:
    """One pre-training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=lambda: options("mapet"))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        self.objective.check_model(self.model)


def change(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with fields replaced, by dotted name: {"optim.clip": 1.0}. FieldError if it cannot work then.

    Another objective.name takes that method's options: those that both methods have as they were, the rest as defaults.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    parts, before = dict(vars(config)), vars(config.objective)
    if (method := sections.get("objective", {}).get("name", before["name"])) != before["name"]:
        names = {field.name for field in dataclasses.fields(objective(method).Options)} - {"name"}
        parts["objective"] = options(method, **{name: value for name, value in before.items() if name in names})
    changed = {name: dataclasses.replace(parts[name], **fields) for name, fields in sections.items()}
    return RunConfig(**{**parts, **changed})


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; paths become text."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(values: Any) -> RunConfig:
    """The inverse of `to_dict`. ValueError (ConfigError) names what is missing, unknown or out of range."""
    values = conform(dict[str, dict[str, Any]], values, "config")
    method = values.get("objective", {}).get("name")
    kinds = {**typing.get_type_hints(RunConfig), "objective": objective(str(method)).Options}
    for names, what in (
        (values.keys() - kinds.keys(), "has an unknown entry"),
        (kinds.keys() - values.keys(), "lacks"),
    ):
        if names:
            raise ConfigError(f"config {what} {min(names)!r}")
    return RunConfig(**{name: conform(kinds[name], part, name) for name, part in values.items()})


def field_notes() -> dict[str, tuple[Any, ...]]:
    """What the annotation of each field of a run says beyond its type, by dotted name; the options of every method."""
    kinds = [pair for pair in typing.get_type_hints(RunConfig).items() if pair[0] != "objective"]
    kinds += [("objective", objective(name).Options) for name in OBJECTIVES]
    return {
        f"{section}.{name}": getattr(hint, "__metadata__", ())
        for section, kind in kinds
        for name, hint in hints(kind).items()
    }
