"""How fast a training step can be on a GPU that is not here, computed from its data sheet. Nothing here is measured.

For a micro-batch of B images, in the terms of memory.py: R rows of the buffer, C of them content, Q predicted; D,
F, V; e bytes of what products read and write, f = 4; casts between the two, (e + f) D a row, under autocast only.

    products    m x k by k x n: 2 m k n operations, e (m k + k n + m n) bytes; once forward, twice backward. The patch
                projection has one backward product.
                Blocks: q R D D, kv C D 2D, proj R D D, fc1 R D F, fc2 R F D; the last block has Q in place of R.
                Patch projection: B patches, 3 p p, D. Head: Q D V.
    attention   4 D operations a visible pair forward (Q K^T and P V), 14 D backward, as the kernels in csrc/ form Q K^T
                and dO V^T in both of their passes; q, k, v and results once forward, twice backward.
    passes      what else reads and writes whole tensors in eager mode. Bytes of a row of a block, forward and backward:
                    norms       2 (2 f D + cast)    2 (6 f D + cast), gradients of x added up
                    additions   2 (3 f D + cast)    2 (2 f D + cast)
                    GELU        2 e F               3 e F
                    biases                          e (4 D + F), the sums over rows
                A predicted row: logits, (4 f + 3 e) V. A row: the buffer and its gradient, 4 f D. A patch: pixels,
                3 p p (1 + f + e). A number of the model: in a micro-batch casts of weights and sums of gradients,
                4 f + e; in a step AdamW and the gradients' norm, 10 f.

What stochastic depth leaves out (speed.skip_dropped) is counted as if it were computed.

Recomputation adds the norms and GELU forward again ("cheap"), or the blocks' whole forward pass ("blocks").

Work takes the larger of operations / (share * operations per second) and bytes / (share * bytes per second), product by
product, and adds up, as one kernel runs after the other. The shares of the data sheet's rates that are reached are
guesses (SHARES); with all of them 1, this step cannot be faster on this GPU. Not counted: the GPU's cache, launches,
clocks that fall under load, reading of images, saving. tests/test_expectation.py counts a real step beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mapet.config import Precision
from mapet.errors import ConfigError
from mapet.planning.memory import FP32, StepSize, parameters, plan_memory, step_size
from mapet.recipes import recipe
from mapet.units import parse_bytes

IMAGENET = 1_281_167
"""Images of ImageNet-1k for training."""

PAPER = {"vit_tiny_kclip": 278, "vit_small_kclip": 139, "vit_base_kclip": 70}
"""Images per second of one V100 in the paper: 300 epochs in about one day on 16, 32 and 64 of them."""


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says. operations: a second, by precision; bandwidth: bytes a second."""

    name: str
    memory: str
    operations: dict[Precision, float]
    bandwidth: float


V100 = Gpu("V100", "16GB", {"fp32": 15.7e12, "fp16": 125e12}, 900e9)
"""SXM2, NVIDIA's data sheet."""

GPUS = {V100.name: V100}


@dataclass(frozen=True)
class Shares:
    """Parts of the data sheet's rates that are reached."""

    products: float = 1.0
    attention: float = 1.0
    bandwidth: float = 1.0


SHARES = (Shares(0.4, 0.08, 0.6), Shares(0.7, 0.25, 0.85))
"""A low and a high guess, for cuBLAS, the kernels in csrc/ and elementwise passes."""


@dataclass(frozen=True)
class Product:
    """A matrix product (m, k) by (k, n), computed `times` times in a step, the backward pass's two included."""

    m: int
    k: int
    n: int
    times: int = 3

    @property
    def operations(self) -> float:
        """Of all times."""
        return 2.0 * self.m * self.k * self.n * self.times

    def bytes(self, element: int) -> float:
        """Operands and result once, of all times."""
        return float(element) * (self.m * self.k + self.k * self.n + self.m * self.n) * self.times


@dataclass(frozen=True)
class Attention:
    """Operations and bytes of one block's attention, forward and backward."""

    forward: float
    backward: float
    bytes: float


def products(size: StepSize) -> Iterator[Product]:
    """Every product of a micro-batch."""
    model, layout = size.model, size.layout(size.micro_batch)
    width, hidden = model.width, size.hidden
    patches = (layout.tokens if layout.target_content else layout.cut) - int(model.class_token)
    yield Product(layout.batch * patches, 3 * model.patch_size**2, width, times=2)
    content, times = layout.batch * layout.content_rows, 4 if size.recompute == "blocks" else 3
    for rows in block_rows(size):
        yield Product(rows, width, width, times)
        yield Product(content, width, 2 * width, times)
        yield Product(rows, width, width, times)
        yield Product(rows, width, hidden, times)
        yield Product(rows, hidden, width, times)
    yield Product(size.predicted(size.micro_batch), width, model.vocabulary)


def block_rows(size: StepSize) -> list[int]:
    """Rows whose outputs each block computes."""
    rows, predicted = size.layout(size.micro_batch).rows, size.predicted(size.micro_batch)
    return [rows] * (size.model.depth - 1) + [predicted]


def visible_pairs(size: StepSize, predicted_only: bool) -> int:
    """Pairs of a row and a key that it sees, of a micro-batch; see mapet_kernels.visibility."""
    layout = size.layout(1)
    tokens, cut, targets = layout.tokens, layout.cut, layout.targets
    if layout.mask_tokens:  # every row sees N keys
        pairs = tokens * (targets if predicted_only else layout.rows)
    else:
        query = targets * cut + targets * (targets - 1) // 2
        pairs = query if predicted_only else cut * cut + 2 * query + targets
    return pairs * size.micro_batch


def attentions(size: StepSize) -> Iterator[Attention]:
    """Attention of every block of a micro-batch."""
    layout, width, repeats = size.layout(size.micro_batch), size.model.width, 2 if size.recompute == "blocks" else 1
    keys = layout.batch * layout.content_rows
    for i, rows in enumerate(block_rows(size)):
        pairs = visible_pairs(size, predicted_only=i == size.model.depth - 1)
        once = 2 * (rows + keys) * width * size.element
        yield Attention(repeats * 4 * pairs * width, 14 * pairs * width, (repeats + 2) * once)


def passes(size: StepSize) -> float:
    """Bytes of everything else of a micro-batch, and its share of the update."""
    model, layout, e = size.model, size.layout(size.micro_batch), size.element
    width, cast = model.width, 0 if size.precision == "fp32" else (size.element + FP32) * size.model.width
    norms, additions, gelu = 2 * (2 * FP32 * width + cast), 2 * (3 * FP32 * width + cast), 2 * e * size.hidden
    again = {"none": 0, "cheap": norms + gelu, "blocks": norms + additions + gelu}[size.recompute]
    backward = 2 * (6 * FP32 * width + cast) + 2 * (2 * FP32 * width + cast)
    backward += 3 * e * size.hidden + e * (4 * width + size.hidden)
    rows = sum(block_rows(size)) * (norms + additions + gelu + again + backward)
    logits = size.predicted(size.micro_batch) * model.vocabulary * (4 * FP32 + 3 * e)
    pixels = layout.batch * model.patches * 3 * model.patch_size**2 * (1 + FP32 + e)
    numbers, steps = parameters(model), size.share / size.micro_batch
    update = numbers * (4 * FP32 + e + 10 * FP32 / steps)
    return rows + logits + pixels + layout.rows * 4 * FP32 * width + update


def model_operations(size: StepSize) -> float:
    """Operations that one image needs forward and backward, however they are computed: nothing twice."""
    once = replace(size, recompute="none")
    linear = sum(replace(p, times=min(p.times, 3)).operations for p in products(once))
    return (linear + sum(3 * a.forward for a in attentions(once))) / size.micro_batch


def images_per_second(size: StepSize, gpu: Gpu, shares: Shares) -> float:
    """The arithmetic at the top of the file. ConfigError where the GPU has no such precision."""
    if size.precision not in gpu.operations:
        known = " and ".join(gpu.operations)
        raise ConfigError(f"a {gpu.name} computes in {known}, not in {size.precision}: set train.precision fp16")
    rate, bandwidth = gpu.operations[size.precision], gpu.bandwidth * shares.bandwidth
    seconds = passes(size) / bandwidth
    for p in products(size):
        seconds += max(p.operations / (rate * shares.products), p.bytes(size.element) / bandwidth)
    for a in attentions(size):
        seconds += max((a.forward + a.backward) / (rate * shares.attention), a.bytes / bandwidth)
    return size.micro_batch / seconds


@dataclass(frozen=True)
class Expectation:
    """Images per second of one GPU: by the low and the high guess, and at most."""

    low: float
    high: float
    most: float

    @property
    def images(self) -> str:
        """The guesses as text."""
        return f"{self.low:.0f} to {self.high:.0f}"

    def hours(self, images: int, epochs: int) -> str:
        """Of so many epochs on one GPU, as text."""
        least, longest = (epochs * images / rate / 3600 for rate in (self.high, self.low))
        return f"{least:.0f} to {longest:.0f} h"


def expect(size: StepSize, gpu: Gpu) -> Expectation:
    """What to expect of one GPU."""
    return Expectation(*(images_per_second(size, gpu, shares) for shares in (*SHARES, Shares())))


def expectation_rows(size: StepSize, gpu: Gpu, images: int, epochs: int) -> list[tuple[str, str]]:
    """What is computed, and its value, for people."""
    expected = expect(size, gpu)
    low, high = SHARES
    return [
        ("operations an image needs, forward and backward", f"{model_operations(size) / 1e9:.0f} GFLOP"),
        ("images per second, at most", f"{expected.most:.0f}"),
        ("images per second, low to high guess", expected.images),
        (f"{epochs} epochs of {images:,} images on one GPU", expected.hours(images, epochs)),
        ("guessed part of the data sheet's operations: products", _part(low.products, high.products)),
        ("attention", _part(low.attention, high.attention)),
        ("guessed part of its bandwidth", _part(low.bandwidth, high.bandwidth)),
    ]


def page(gpu: Gpu = V100) -> str:
    """The README's table: the paper's recipes on one GPU, in all of its memory."""
    lines = [
        "| computed | micro-batch | images/s | at most | paper's V100 | 300 epochs of ImageNet-1k |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rate in PAPER.items():
        size = step_size(recipe(name), 1)
        plan = plan_memory(size, parse_bytes(gpu.memory))
        expected = expect(replace(size, micro_batch=plan.micro_batch, recompute=plan.recompute), gpu)
        micro_batch = f"{plan.micro_batch}, recompute {plan.recompute}"
        cells = [f"`{name}`", micro_batch, expected.images, f"{expected.most:.0f}", f"{rate}"]
        lines.append(f"| {' | '.join([*cells, expected.hours(IMAGENET, 300)])} |")
    return "\n".join(lines)


def _part(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


if __name__ == "__main__":
    print(page())
