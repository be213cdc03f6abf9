"""How fast a step can be on GPUs that are not here, computed from data sheets. Nothing here is measured.

One GPU: every operator of the traced step (trace.py) takes the larger of FLOP / (share * FLOP per second) and bytes /
(share * bytes per second), and one runs after the other. Bytes are what an operator reads and writes. The shares of
the data sheet's rates that are reached are guesses (SHARES); with all of them 1, no step can be faster on this GPU.
Attention's backward pass counts seven products for five, as the kernels in csrc/ form two of them in both of their
passes. Not counted: the GPU's cache, launches, clocks that fall under load, reading of images, saving; what stochastic
depth leaves out (speed.skip_dropped) is counted as if it were computed. tests/test_estimate.py counts a real step
beside it.

Several GPUs: n of them, P parameters, a global batch of G images, and a link of w bytes per second between neighbours
of the ring (one link per GPU, its slowest):

    gradients of a step          4 P bytes                    DDP reduces them in fp32
    sent by each GPU             2 (n - 1) / n * 4 P          ring all-reduce: reduce-scatter, then all-gather
    time of the all-reduce       2 (n - 1) / n * 4 P / w      latency left out: a lower bound
    storage                      images * bytes of one        as a batch has it, whole numbers as uint16
    steps of an epoch            images // G

and, where the images per second r of one GPU are known (its own share, without communication):

    computing a step             G / (n r)
    a step                       between max(computing, all-reduce), all of it hidden, and their sum, none of it
    reading, all GPUs together   G * bytes of one image / the shorter of these steps
    an epoch                     steps * time of a step

`python -m mapet.planning.estimate` prints the README's table, and with `scaling` docs/scaling.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from mapet.config import ModelConfig, Precision, RunConfig
from mapet.errors import ConfigError
from mapet.planning.memory import StepSize, plan_memory, step_size
from mapet.planning.trace import Work, network
from mapet.recipes import recipe
from mapet.units import duration, metric, parse_bytes, parse_link, parse_rate

IMAGENET = 1_281_167
"""Images of ImageNet-1k for training."""

PAPER = {"vit_tiny_kclip": 278, "vit_small_kclip": 139, "vit_base_kclip": 70}
"""Images per second of one V100 in the paper: 300 epochs in about one day on 16, 32 and 64 of them."""


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says. operations: FLOP a second, by precision; bandwidth: bytes a second."""

    name: str
    memory: str
    operations: dict[Precision, float]
    bandwidth: float


def _gpu(name: str, memory: str, fp32: float, half: float, gigabytes: float, *, bf16: bool = True) -> Gpu:
    rates = {"fp32": fp32 * 1e12, "fp16": half * 1e12} | ({"bf16": half * 1e12} if bf16 else {})
    return Gpu(name, memory, rates, gigabytes * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100", "16GB", 15.7, 125, 900, bf16=False),
        _gpu("T4", "16GB", 8.1, 65, 320, bf16=False),
        _gpu("A100", "80GB", 19.5, 312, 2039),
        _gpu("H100", "80GB", 67, 989, 3350),
        _gpu("H200", "141GB", 67, 989, 4800),
        _gpu("B200", "180GB", 75, 2250, 7700),
        _gpu("RTX 4090", "24GB", 82.6, 165.2, 1008),
    )
}
"""By NVIDIA's data sheets (of the RTX 4090 by the Ada white paper): SXM where there are several; memory, TFLOP/s in fp32
without TF32 and of dense products in fp16 or bf16 that add up in fp32, GB/s. A V100 and a T4 have no bf16."""


def gpu_of(name: str | None, peak: str | None, bandwidth: str | None) -> Gpu | None:
    """A GPU by name, with rates such as 312T (FLOP per second) and 2.0TB (bytes per second) in place of its own.

    None where nothing is given; ConfigError where something is missing or unknown.
    """
    if not (name or peak or bandwidth):
        return None
    if name and name not in GPUS:
        raise ConfigError(f"no data sheet of {name!r}, but of {', '.join(GPUS)}; give --peak and --bandwidth")
    if not name and not (peak and bandwidth):
        raise ConfigError("a GPU without a name takes both --peak, such as 312T, and --bandwidth, such as 2.0TB")
    gpu = GPUS[name] if name else Gpu(f"GPU of {peak}FLOP/s and {bandwidth}/s", "", {}, 0)
    rates = dict.fromkeys(("fp32", "fp16", "bf16"), parse_rate(peak)) if peak else gpu.operations
    return replace(gpu, operations=rates, bandwidth=parse_link(bandwidth) if bandwidth else gpu.bandwidth)


@dataclass(frozen=True)
class Shares:
    """Parts of the data sheet's rates that are reached."""

    products: float = 1.0
    attention: float = 1.0
    bandwidth: float = 1.0


SHARES = (Shares(0.4, 0.08, 0.6), Shares(0.7, 0.25, 0.85))
"""A low and a high guess, for cuBLAS, the kernels in csrc/ and elementwise passes."""

TWO_PASSES = 7 / 5
"""Products of attention's backward pass that are computed, to those that are needed."""


def model_operations(size: StepSize) -> float:
    """FLOP that one image needs forward and backward, however they are computed: nothing twice."""
    work = replace(size, recompute="none").trace().work
    parts = {kind: sum(flop * n for (k, flop, _), n in work.items() if k == kind) for kind in ("product", "attention")}
    return (parts["product"] + 3 * parts["attention"]) / size.micro_batch


def images_per_second(size: StepSize, gpu: Gpu, shares: Shares) -> float:
    """The arithmetic at the top of the file. ConfigError where the GPU has no such precision."""
    precision = size.config.train.precision
    if precision == "auto":
        precision = "bf16" if "bf16" in gpu.operations else "fp16"
    if precision not in gpu.operations:
        known = " and ".join(gpu.operations)
        raise ConfigError(f"a {gpu.name} computes in {known}, not in {precision}: set train.precision fp16")
    rate, bandwidth = gpu.operations[precision], gpu.bandwidth * shares.bandwidth
    reached = {
        "product": rate * shares.products,
        "attention": rate * shares.attention,
        "attention backward": rate * shares.attention / TWO_PASSES,
        "pass": rate,
    }

    def seconds(work: Work) -> float:
        return sum(n * max(flop / reached[kind], bytes / bandwidth) for (kind, flop, bytes), n in work.items())

    traced = size.trace()
    return size.share / (seconds(traced.work) * size.share / size.micro_batch + seconds(traced.update))


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


def _part(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


@dataclass(frozen=True)
class Cluster:
    """GPUs and what they work on.

    Attributes:
        link: bytes per second of one GPU's slowest link.
        images: of one epoch.
        rate: images per second that one GPU trains on its own, measured; None for unknown.
    """

    gpus: int
    link: float
    global_batch: int
    images: int
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.global_batch % self.gpus:
            raise ConfigError(f"a global batch of {self.global_batch} cannot be shared evenly by {self.gpus} GPUs")
        if self.images < self.global_batch:
            raise ConfigError(f"{self.images} images are fewer than a global batch of {self.global_batch}")
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"images per second must be positive, got {self.rate}")


def scaling_rows(config: RunConfig, cluster: Cluster) -> list[tuple[str, str]]:
    """What is computed of several GPUs, and its value, for people."""
    gpus, batch, built = cluster.gpus, cluster.global_batch, network(config)
    gradients, image = sum(built.learning), built.image_bytes
    sent, steps = 2 * (gpus - 1) / gpus * gradients, cluster.images // batch
    reduce = sent / cluster.link
    rows = [
        ("images of one GPU in a step", f"{batch // gpus:,}"),
        ("gradients of a step", metric(gradients, "B")),
        ("sent by each GPU in a step", metric(sent, "B")),
        ("ring all-reduce, without latency", duration(reduce)),
        ("one image in the cache", metric(image, "B")),
        ("storage of the cache", metric(cluster.images * image, "B")),
        ("steps of an epoch", f"{steps:,}"),
    ]
    if not cluster.rate:
        return [*rows, ("computing a step", "unknown: give --images-per-second of one GPU, measured")]
    compute = batch / (gpus * cluster.rate)
    hidden, not_hidden = max(compute, reduce), compute + reduce
    return [
        *rows,
        ("computing a step", duration(compute)),
        ("a step, all-reduce hidden or not", between(hidden, not_hidden)),
        ("reading, all GPUs together", f"{metric(batch * image / hidden, 'B')}/s"),
        ("an epoch, all-reduce hidden or not", between(steps * hidden, steps * not_hidden)),
    ]


def between(low: float, high: float) -> str:
    """A range of durations; one where both read alike."""
    texts = duration(low), duration(high)
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def speed_table(gpu: Gpu = GPUS["V100"]) -> str:
    """The README's table: the paper's recipes on one GPU, in all of its memory."""
    lines = [
        _row("computed", "micro-batch", "images/s", "at most", "paper's V100", "300 epochs of ImageNet-1k"),
        _row("---", *["---:"] * 5),
    ]
    for name, rate in PAPER.items():
        size = step_size(recipe(name), 1)
        plan = plan_memory(size, parse_bytes(gpu.memory))
        expected = expect(replace(size, micro_batch=plan.micro_batch, recompute=plan.recompute), gpu)
        micro_batch = f"{plan.micro_batch}, recompute {plan.recompute}"
        cells = f"`{name}`", micro_batch, expected.images, f"{expected.most:.0f}", f"{rate}"
        lines.append(_row(*cells, expected.hours(IMAGENET, 300)))
    return "\n".join(lines)


LINK, RATE = "400Gb", 1000.0
DATA = {"ImageNet-1k": IMAGENET, "A billion images": 10**9}
CLUSTERS = ((8, 2048), (64, 2048), (1024, 2048), (1024, 32768))
"""GPUs and global batch: the paper's batch, and its 32 images per GPU where 1,024 GPUs would have two each."""

INTRODUCTION = f"""# More GPUs, on paper

Everything on this page is computed, not measured: no run with more than one GPU stands behind it. The formulas are in
`mapet/planning/estimate.py`; `python -m mapet.planning.estimate scaling` prints this page, and a test compares the two.

Assumed: ViT-B at 224 pixels, a link of {LINK} per second for each GPU, no latency, gradients reduced in fp32 by a ring,
and one GPU that trains {RATE:g} images per second. That rate is a round number to calculate with, not a result; put in
your own:

    mapet plan --model base --gpus 64 --interconnect {LINK} --images 1.28M --images-per-second RATE

At 1,024 GPUs the paper's batch of 2048 leaves two images to each, and the all-reduce is most of the step; with 32
images each, as in the paper, the batch is 32,768, for which the learning rate has to be found anew.
"""


def scaling_page() -> str:
    """docs/scaling.md."""
    config, parts = RunConfig(model=ModelConfig.preset("base")), [INTRODUCTION]
    for data, images in DATA.items():
        clusters = [Cluster(gpus, parse_link(LINK), batch, images, RATE) for gpus, batch in CLUSTERS]
        columns = [dict(scaling_rows(config, cluster)) for cluster in clusters]
        parts.append(f"## {data}\n")
        parts.append(_row("computed", *(f"{c.gpus:,} GPUs, batch {c.global_batch:,}" for c in clusters)))
        parts.append(_row(*["---"] * (len(clusters) + 1)))
        parts += [_row(name, *(column[name] for column in columns)) for name in columns[0]]
        parts.append("")
    return "\n".join(parts)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(scaling_page() if sys.argv[1:] == ["scaling"] else speed_table(), end="" if sys.argv[1:] else "\n")
