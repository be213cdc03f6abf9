"""How much GPU memory a training step takes, by arithmetic alone, and which micro-batch and recomputation fit a limit.

The switches of section speed are at their defaults. What stochastic depth leaves out (speed.skip_dropped) is not taken
off, as it varies from step to step: the figures are those of a step that drops nothing, and no step needs more.

All figures are bytes. f = 4 for fp32; e is the size of what matrix products read and write: 2 under autocast (bf16,
fp16), else 4. For B images of a micro-batch: R rows of the buffer, C of them content, Q = B T predicted; D width, F
hidden width of the MLP, H heads, V vocabulary, L blocks. Autograd keeps, in a block that computes nothing again:

    residual stream x                  f R D      read by norm1 (the first x is the embedding's result)
    norm1's mean and 1 / deviation     8 R
    norm1's result                     e R D      one copy for both products; in fp32 the result itself
    q, kv                              e R D + 2 e C D
    attention's result, log-sum-exp    e R D + f R H        attention keeps q, kv and both of these
    x between the branches, norm2      f R D + 8 R + e R D
    fc1's result, GELU's result        2 e R F
    drop-path factors                  2 f R
    weights                            autocast: their casts, e (4 D D + 2 D F); fp32: proj and fc2 times their layer
                                       scale, f (D D + D F)

The last block has Q in place of R except in x, norm1 and its result. "cheap" keeps neither the results of the norms and
of GELU, nor the norms' statistics, nor any weight but proj's. "blocks" keeps x and the drop-path factors; the rest
exists for one block, and for one part of the images (`part_size`), at a time. Besides, always: the embedding's patches
e B P 3 p p (of the cut's patches only, where targets are no content), f Q D + 8 Q of the last norm, and of the head,
whose gradients the forward pass forms, those of features and decoder: e Q D + f V (D + 1).

The peak is the largest of these moments; what was kept for later blocks is free by then, gradients of later blocks (of
all, if they add up over micro-batches) exist:

    loss        of a chunk of n rows: logits e n V, their fp32 copy under autocast and their softmax, f n V each; the
                chunk's features e n D and the decoder's cast e V D (both under autocast only); all features and the
                targets, f Q D + 8 Q; with colour jitter the pictures in fp32, f B 3 S S
    head        the gradients of features and decoder times that of the loss, f Q D + f V D
    last norm   the last block's x, the two norm gradients, or three of its result, beside the gradient of x:
                R D (2 f + max(2 f, 3 e))
    fc2         of a block: gradient of its output f R D and of the branch e R D, of GELU's result e R F; what is
                computed again then: GELU's result and fc2's weights (cheap), the rest of the block (blocks)
    update      all gradients; with a moving average the differences, as large as the weights

With train.parallel fsdp, n processes share out P parameters; E of them, in embedding, last norm and head, are
one unit, and the K of each block another (mapet/training/parallel.py). See `in_parts`:

    weights     4 P / n, and whole: E, the block at work, the next one, and the buffer in which it arrives: 4 (E + 3 K)
    gradients   4 P / n, and whole: E, the block at work and the one whose are being reduced: 4 (E + 2 K); all 4 P and
                4 K while gradients add up over micro-batches, for they are reduced once a step
    optimizer   8 P / n; average 4 P / n; update: all in parts, no weight whole

The arithmetic is for eager mode: torch.compile keeps another set of tensors. tests/test_plan.py compares it with what
torch allocates for the real objectives, operator by operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from mapet.config import ModelConfig, ObjectiveConfig, Parallel, Precision, Recompute, RunConfig
from mapet.errors import ConfigError
from mapet.model.streams import StreamLayout
from mapet.objectives.loss import CHUNK_BYTES
from mapet.objectives.two_stream import part_size
from mapet.units import gib

LEVELS: tuple[Recompute, ...] = get_args(Recompute)
"""Fastest first."""

STREAMS = {"mapet": (True, True, True), "pim": (True, False, True), "mim": (False, True, False)}
"""target_content, mask_tokens and query_stream of the objectives' layouts."""

FP32 = 4
WORKSPACE = 32 << 20
"""What cuBLAS takes on a GPU of sm_90 beside torch's tensors; less on older ones."""

USABLE = 0.95
"""Part of a limit that a plan fills: the allocator's blocks do not fit together without gaps."""

BUSY_ROWS = 8192
"""Rows of the buffer with which a GPU counts as busy: an assumption, used only to choose between levels."""


@dataclass(frozen=True)
class StepSize:
    """What memory depends on.

    Attributes:
        micro_batch: images of a forward pass.
        share: images of this process in a step, all on the device at once.
        ema: whether a moving average of the weights is kept.
        processes: with several, gradients exist all the time.
        parallel: whether the processes share out weights (fsdp).
        jitter: whether the pictures' colours are changed.
    """

    model: ModelConfig
    objective: ObjectiveConfig
    micro_batch: int
    share: int
    precision: Precision = "fp32"
    recompute: Recompute = "none"
    ema: bool = False
    processes: int = 1
    jitter: bool = False
    parallel: Parallel = "ddp"

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and optimizer state exist in parts."""
        return self.parallel == "fsdp" and self.processes > 1

    @property
    def element(self) -> int:
        """e."""
        return FP32 if self.precision == "fp32" else 2

    @property
    def hidden(self) -> int:
        """F."""
        return int(self.model.width * self.model.mlp_ratio)

    def layout(self, images: int) -> StreamLayout:
        """The buffer's rows for so many images."""
        content, masks, query = STREAMS[self.objective.name]
        return StreamLayout(
            images,
            self.model.tokens,
            getattr(self.objective, "cut", None) or self.model.tokens - self.objective.masked,
            target_content=content,
            mask_tokens=masks,
            query_stream=query,
        )

    def predicted(self, images: int) -> int:
        """Q for so many images."""
        return images * self.layout(1).targets


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the peak, by part; `moment` names it (see the top of the file)."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    images: int
    activations: int = 0
    attention: int = 0
    head: int = 0
    temporary: int = 0
    """Gradients of activations, and what is computed again."""
    workspace: int = WORKSPACE
    moment: str = ""

    @property
    def total(self) -> int:
        """All of it: what torch.cuda.max_memory_allocated reports."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {name: value for name, value in vars(self).items() if name != "moment"}


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward pass."""

    activations: int = 0
    attention: int = 0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.activations + other.activations, self.attention + other.attention)

    @property
    def total(self) -> int:
        return self.activations + self.attention


def parameters(model: ModelConfig) -> int:
    """Numbers that are trained."""
    return embedding_parameters(model) + model.depth * block_parameters(model) + head_parameters(model)


def block_parameters(model: ModelConfig) -> int:
    """Numbers in a block: norms, q, kv, proj, fc1, fc2 with biases, layer scales."""
    width, hidden = model.width, int(model.width * model.mlp_ratio)
    return 4 * width + 4 * width * (width + 1) + hidden * (width + 1) + width * (hidden + 1) + 2 * width


def embedding_parameters(model: ModelConfig) -> int:
    """Numbers in patch projection, positions, mask token and class token."""
    return model.width * (3 * model.patch_size**2 + 1 + model.tokens + 1 + int(model.class_token))


def head_parameters(model: ModelConfig) -> int:
    """Numbers in the last norm and the decoder."""
    return 2 * model.width + model.vocabulary * (model.width + 1)


def predict_memory(size: StepSize) -> Memory:
    """The peak of a training step on one GPU, without the CUDA context."""
    every = moments(size)
    return max((in_parts(size, m) for m in every) if size.sharded else every, key=lambda memory: memory.total)


def in_parts(size: StepSize, memory: Memory) -> Memory:
    """A moment of copies as one of parts; what is whole and in flight is bounded from above (top of the file)."""
    model, n = size.model, size.processes
    numbers, block = parameters(model), block_parameters(model)
    around = numbers - model.depth * block
    part = -(-FP32 * numbers // n)
    parts = replace(memory, weights=part, gradients=part, optimizer=2 * part, average=part if size.ema else 0)
    if memory.moment == "update":
        return replace(parts, temporary=part if size.ema else 0)
    reduced_once = size.share > size.micro_batch
    gradients = numbers + block if reduced_once else around + min(2, model.depth) * block
    weights = around + min(3, model.depth + 1) * block
    return replace(parts, weights=part + FP32 * weights, gradients=part + FP32 * gradients)


def moments(size: StepSize) -> Iterator[Memory]:
    """Memory at each moment that can be the peak."""
    model, numbers = size.model, parameters(size.model)
    adds_up = size.share > size.micro_batch or size.processes > 1
    always = Memory(
        weights=FP32 * numbers,
        gradients=FP32 * numbers if adds_up else 0,
        optimizer=2 * FP32 * numbers,
        average=FP32 * numbers if size.ema else 0,
        images=size.share * (3 * model.image_size**2 + 8 * (model.patches + model.tokens)),
    )

    def moment(name: str, kept: Kept, gradients: int, head: int = 0, temporary: int = 0) -> Memory:
        return replace(
            always,
            gradients=always.gradients or gradients,
            activations=kept.activations,
            attention=kept.attention,
            head=head,
            temporary=temporary,
            moment=name,
        )

    everything = kept_in_all(size)
    pictures = FP32 * size.micro_batch * 3 * model.image_size**2 if size.jitter else 0
    yield moment("loss", everything, 0, head=loss_bytes(size), temporary=pictures)
    yield moment("head", everything, 0, head=head_bytes(size))
    last, images = model.depth - 1, recomputed_images(size)
    others = kept_before_head(size, size.micro_batch - images)  # of parts that the backward pass comes to later
    waiting = FP32 * (size.predicted(size.micro_batch) - size.predicted(images)) * model.width  # their gradients
    for block in {0, max(last - 1, 0), last}:
        gradients = FP32 * ((last - block) * block_parameters(model) + head_parameters(model))
        kept = others + kept_up_to(size, images, block + 1)
        temporary = waiting + fc2_temporary(size, block == last, images)
        yield moment(f"fc2 of block {block}", kept, gradients, temporary=temporary)
    numbers_of_x = size.layout(images).rows * model.width
    temporary = waiting + numbers_of_x * (2 * FP32 + max(2 * FP32, 3 * size.element))
    kept = others + kept_up_to(size, images, last)
    yield moment("last norm", kept, FP32 * head_parameters(model), temporary=temporary)
    yield moment("update", Kept(), FP32 * numbers, temporary=FP32 * numbers if size.ema else 0)


def kept_in_all(size: StepSize) -> Kept:
    """What a forward pass keeps: the head's gradients, and all before them."""
    model, predicted = size.model, size.predicted(size.micro_batch)
    gradients = size.element * predicted * model.width + FP32 * model.vocabulary * (model.width + 1)
    return kept_before_head(size, size.micro_batch) + Kept(gradients)


def kept_before_head(size: StepSize, images: int) -> Kept:
    """What embedding, blocks and last norm keep of so many images."""
    predicted = size.predicted(images)
    return kept_up_to(size, images, size.model.depth) + Kept(predicted * (FP32 * size.model.width + 8))


def kept_up_to(size: StepSize, images: int, blocks: int) -> Kept:
    """What the embedding and the first `blocks` blocks keep of so many images."""
    if not images:
        return Kept()
    model, layout = size.model, size.layout(images)
    patches = layout.tokens if layout.target_content else layout.cut
    patches -= int(model.class_token)
    kept = Kept(size.element * layout.batch * patches * 3 * model.patch_size**2)
    for block in range(blocks):
        kept += kept_in_block(size, images, size.recompute, block == model.depth - 1)
    return kept


def kept_in_block(size: StepSize, images: int, recompute: Recompute, last: bool) -> Kept:
    """What one block keeps at a level."""
    model, layout, e, hidden = size.model, size.layout(images), size.element, size.hidden
    width, rows = model.width, layout.rows
    out = images * layout.targets if last else rows
    x = FP32 * rows * width
    factor = FP32 * out if model.drop_path else 0
    if recompute == "blocks":
        return Kept(x + 2 * factor)
    content = images * layout.content_rows
    attention = e * width * (2 * out + 2 * content) + FP32 * out * model.heads
    always = x + 2 * factor + FP32 * out * width + e * out * hidden
    if recompute == "cheap":
        return Kept(always + e * width**2, attention)
    results = e * (rows * width + out * width + out * hidden) + 8 * (rows + out)
    if last and not layout.query_stream:
        results += e * out * width  # norm1's result of the predicted rows is no view there
    scaled, others = width * (width + hidden), width * (3 * width + hidden)
    return Kept(always + results + e * (scaled + (others if size.precision != "fp32" else 0)), attention)


def recomputed_images(size: StepSize) -> int:
    """Images whose activations of a block exist at a time."""
    return part_size(size.micro_batch) if size.recompute == "blocks" else size.micro_batch


def fc2_temporary(size: StepSize, last: bool, images: int) -> int:
    """Gradients while the backward pass is at fc2 of a block, and what it computed again until there."""
    model, layout, e, hidden = size.model, size.layout(images), size.element, size.hidden
    out = images * layout.targets if last else layout.rows
    gradients = out * ((FP32 + e) * model.width + e * hidden) + e * model.width * hidden
    if size.recompute == "none":
        return gradients
    if size.recompute == "cheap":
        return gradients + e * out * hidden + e * model.width * hidden
    whole, x = kept_in_block(size, images, "none", last), kept_in_block(size, images, "blocks", last)
    return gradients + whole.total - x.total


def chunk_rows(size: StepSize) -> int:
    """n, rows of a chunk of the head."""
    return min(size.predicted(size.micro_batch), max(1, CHUNK_BYTES["cuda"] // (FP32 * size.model.vocabulary)))


def head_casts(size: StepSize) -> int:
    """Decoder and a chunk's features in the dtype of matrix products."""
    rows = size.model.vocabulary + chunk_rows(size)
    return 0 if size.precision == "fp32" else size.element * rows * size.model.width


def loss_bytes(size: StepSize) -> int:
    """Logits of a chunk and their softmax, features and targets, in the forward pass."""
    copies = 2 * FP32 if size.precision == "fp32" else size.element + 2 * FP32
    inputs = size.predicted(size.micro_batch) * (FP32 * size.model.width + 8)
    return copies * chunk_rows(size) * size.model.vocabulary + head_casts(size) + inputs


def head_bytes(size: StepSize) -> int:
    """The gradients of features and decoder, in the backward pass."""
    return FP32 * size.model.width * (size.predicted(size.micro_batch) + size.model.vocabulary)


@dataclass(frozen=True)
class Plan:
    """How a process's share of a step is divided, and what it takes."""

    micro_batch: int
    accumulation: int
    recompute: Recompute
    memory: Memory


def step_size(config: RunConfig, processes: int, micro_batch: int = 0) -> StepSize:
    """The step of a configuration with this micro-batch, its own, or the whole share. ConfigError if it is uneven."""
    share, micro = config.optim.global_batch // processes, micro_batch or config.train.micro_batch
    if config.optim.global_batch % processes:
        raise ConfigError(f"optim.global_batch {config.optim.global_batch} is not divisible by {processes} processes")
    if share % (micro or share):
        raise ConfigError(f"train.micro_batch {micro} does not divide the {share} images of one process in a step")
    precision = config.train.precision
    return StepSize(
        config.model,
        config.objective,
        micro or share,
        share,
        "bf16" if precision == "auto" else precision,  # on an older GPU it is fp16, which takes as much
        config.train.recompute,
        config.train.ema_decay > 0,
        processes,
        config.data.color_jitter > 0,
        config.train.parallel,
    )


def plan_memory(size: StepSize, limit: int, *, levels: Sequence[Recompute] = LEVELS, micro_batch: int = 0) -> Plan:
    """The fastest level that fits `limit` bytes, with the largest micro-batch that divides the share and fits.

    A level is passed over for a slower one while its micro-batch would leave the GPU idle (BUSY_ROWS), if that helps.

    Args:
        levels: those to choose from.
        micro_batch: the one to take; 0 to choose.

    Raises:
        ConfigError: nothing fits; the text says what would.
    """
    candidates = [plan for level in levels if (plan := _largest(size, level, limit, micro_batch))]
    if not candidates:
        raise ConfigError(nothing_fits(size, limit, levels, micro_batch))
    for plan in candidates:
        if plan.micro_batch in (size.share, micro_batch) or size.layout(plan.micro_batch).rows >= BUSY_ROWS:
            return plan
    return max(candidates, key=lambda plan: plan.micro_batch)


def nothing_fits(size: StepSize, limit: int, levels: Sequence[Recompute] = LEVELS, micro_batch: int = 0) -> str:
    """Why no plan fits, and what would: other settings first, then more memory."""
    level, smallest = levels[-1], micro_batch or 1
    needed = predict_memory(replace(size, micro_batch=smallest, recompute=level))
    text = f"{gib(limit)} are too little: micro-batch {smallest} with recompute {level} takes {gib(needed.total)}"
    try:
        other = plan_memory(size, limit) if len(levels) < len(LEVELS) or micro_batch else None
    except ConfigError:
        other = None
    if other is not None:
        fits = f"micro-batch {other.micro_batch} with recompute {other.recompute}"
        return f"{text}; {fits} fits, {gib(other.memory.total)}"
    least = replace(size, micro_batch=1, recompute=LEVELS[-1])
    smallest_of_all = predict_memory(least).total
    parts = predict_memory(replace(least, parallel="fsdp")).total
    shared = f"set train.parallel=fsdp (then {gib(parts / USABLE)}), " if parts < smallest_of_all else ""
    return (
        f"{text} ({gib(needed.images)} of that for all images of a step); the least that would do is "
        f"{gib(smallest_of_all / USABLE)}: {shared}give more, spread the global batch over more GPUs, or take a "
        "smaller model"
    )


def out_of_memory_advice(size: StepSize, limit: int) -> str:
    """What to change after a step of `size` did not fit into `limit` bytes (0: unknown), with numbers."""
    predicted = predict_memory(size)
    said = (
        f"out of memory with micro-batch {size.micro_batch} and recompute {size.recompute}, which by "
        f"`mapet plan` take {gib(predicted.total)}" + (f" of {gib(limit)}" if limit else "")
    )
    smaller = [d for d in divisors(size.share) if d < size.micro_batch]
    options = [(smaller[-1], size.recompute)] if smaller else []
    slower = LEVELS[LEVELS.index(size.recompute) + 1 :]
    options += [(size.micro_batch, level) for level in slower]
    choices = [
        f"train.micro_batch={micro} train.recompute={level} (predicted {gib(memory.total)})"
        for micro, level in options
        for memory in [predict_memory(replace(size, micro_batch=micro, recompute=level))]
    ]
    parts = predict_memory(replace(size, parallel="fsdp")).total
    if parts < predicted.total:
        choices.append(f"train.parallel=fsdp (predicted {gib(parts)})")
    if not choices:
        return f"{said}; take a smaller model or more memory"
    automatic = "" if size.sharded else ", or give --auto-batch"
    return f"{said}; set {', or '.join(choices)}{automatic}; what is learned stays the same"


def divisors(number: int) -> list[int]:
    """All of them, in rising order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _largest(size: StepSize, level: Recompute, limit: int, micro_batch: int) -> Plan | None:
    """The largest micro-batch that fits at a level."""
    for micro in [micro_batch] if micro_batch else reversed(divisors(size.share)):
        memory = predict_memory(replace(size, micro_batch=micro, recompute=level))
        if memory.total <= USABLE * limit:
            return Plan(micro, size.share // micro, level, memory)
    return None
