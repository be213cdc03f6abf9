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

`python -m mapet.planning.estimate` prints the tables of README.md and docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mapet.config import ModelConfig, OptimConfig, PrecisionChoice, RunConfig
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
    """What a data sheet says: FLOP a second in fp32 and of fp16 products, bytes a second; bf16 is as fast as fp16."""

    name: str
    memory: str
    fp32: float
    fp16: float
    bandwidth: float
    bf16: bool = True

    def operations(self, precision: PrecisionChoice) -> float:
        """FLOP a second. ConfigError where the GPU has no such precision."""
        if precision == "bf16" and not self.bf16:
            raise ConfigError(f"a {self.name} computes in fp32 and fp16, not in bf16: set train.precision fp16")
        return self.fp32 if precision == "fp32" else self.fp16


GPUS = {
    "V100": Gpu("V100", "16GB", 15.7e12, 125e12, 900e9, bf16=False),
    "T4": Gpu("T4", "16GB", 8.1e12, 65e12, 320e9, bf16=False),
    "A100": Gpu("A100", "80GB", 19.5e12, 312e12, 2039e9),
    "H100": Gpu("H100", "80GB", 67e12, 989e12, 3350e9),
    "H200": Gpu("H200", "141GB", 67e12, 989e12, 4800e9),
    "B200": Gpu("B200", "180GB", 75e12, 2250e12, 7700e9),
    "RTX 4090": Gpu("RTX 4090", "24GB", 82.6e12, 165.2e12, 1008e9),
}
"""By NVIDIA's data sheets (of the RTX 4090 by the Ada white paper), SXM where there are several: fp32 without TF32,
fp16 of dense products that add up in fp32."""


def gpu_of(name: str | None, peak: str | None, bandwidth: str | None) -> Gpu | None:
    """A GPU by name, with rates such as 312T (FLOP per second) and 2.0TB (bytes per second) in place of its own.

    None where nothing is given; ConfigError where something is missing.
    """
    if not (name or peak or bandwidth):
        return None
    if not name and not (peak and bandwidth):
        raise ConfigError("a GPU without a name takes both --peak, such as 312T, and --bandwidth, such as 2.0TB")
    if name and name not in GPUS:
        raise ConfigError(f"--gpu {name}: known are {', '.join(GPUS)}; for others give --peak and --bandwidth alone")
    gpu = GPUS[name] if name else Gpu("GPU of these rates", "", 0, 0, 0)
    if peak:
        gpu = replace(gpu, fp32=parse_rate(peak), fp16=parse_rate(peak), bf16=True)
    return replace(gpu, bandwidth=parse_link(bandwidth)) if bandwidth else gpu


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
    rate, bandwidth = gpu.operations(size.config.train.precision), gpu.bandwidth * shares.bandwidth
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


def expect(size: StepSize, gpu: Gpu) -> tuple[float, ...]:
    """Images per second of one GPU: by the low and the high guess, and at most."""
    return tuple(images_per_second(size, gpu, shares) for shares in (*SHARES, Shares()))


def hours(images: int, epochs: int, slow: float, fast: float) -> str:
    """Of so many epochs at these images per second, as text."""
    return f"{epochs * images / fast / 3600:.0f} to {epochs * images / slow / 3600:.0f} h"


def expectation_rows(size: StepSize, gpu: Gpu, images: int, epochs: int) -> list[tuple[str, str]]:
    """What is computed, and its value, for people."""
    low, high, most = expect(size, gpu)
    products, attention, bandwidth = (
        f"{100 * getattr(SHARES[0], name):.0f} to {100 * getattr(SHARES[1], name):.0f} %" for name in vars(Shares())
    )
    return [
        ("operations an image needs, forward and backward", f"{model_operations(size) / 1e9:.0f} GFLOP"),
        ("images per second, at most", f"{most:.0f}"),
        ("images per second, low to high guess", f"{low:.0f} to {high:.0f}"),
        (f"{epochs} epochs of {images:,} images on one GPU", hours(images, epochs, low, high)),
        ("guessed part of the data sheet's operations: products", products),
        ("attention", attention),
        ("guessed part of its bandwidth", bandwidth),
    ]


def scaling_rows(
    config: RunConfig, gpus: int, link: float, images: int, rate: float | None = None
) -> list[tuple[str, str]]:
    """What is computed of several GPUs, and its value, for people.

    Args:
        link: bytes per second of one GPU's slowest link.
        images: of one epoch.
        rate: images per second that one GPU trains on its own, measured; None for unknown.
    """
    batch, built = config.optim.global_batch, network(config)
    if gpus < 1 or batch % gpus:
        raise ConfigError(f"a global batch of {batch} cannot be shared evenly by {gpus} GPUs")
    if images < batch:
        raise ConfigError(f"{images} images are fewer than a global batch of {batch}")
    if rate is not None and rate <= 0:
        raise ConfigError(f"images per second must be positive, got {rate}")
    gradients, image, steps = sum(built.learning), built.image_bytes, images // batch
    sent = 2 * (gpus - 1) / gpus * gradients
    rows = [
        ("images of one GPU in a step", f"{batch // gpus:,}"),
        ("gradients of a step", metric(gradients, "B")),
        ("sent by each GPU in a step", metric(sent, "B")),
        ("ring all-reduce, without latency", duration(sent / link)),
        ("one image in the cache", metric(image, "B")),
        ("storage of the cache", metric(images * image, "B")),
        ("steps of an epoch", f"{steps:,}"),
    ]
    if rate is None:
        return [*rows, ("computing a step", "unknown: give --images-per-second of one GPU, measured")]
    compute = batch / (gpus * rate)
    hidden, not_hidden = max(compute, sent / link), compute + sent / link
    return [
        *rows,
        ("computing a step", duration(compute)),
        ("a step, all-reduce hidden or not", between(hidden, not_hidden)),
        ("reading, all GPUs together", f"{metric(batch * image / hidden, 'B')}/s"),
        ("an epoch, all-reduce hidden or not", between(steps * hidden, steps * not_hidden)),
    ]


def between(low: float, high: float) -> str:
    """A range of durations; one where both read alike."""
    return " to ".join(dict.fromkeys((duration(low), duration(high))))


def speed_table() -> str:
    """The README's table: the paper's recipes on one V100, in all of its memory."""
    gpu = GPUS["V100"]
    header = "computed", "micro-batch", "images/s", "at most", "paper's V100", "300 epochs of ImageNet-1k"
    rows = [header, ("---", *["---:"] * 5)]
    for name, rate in PAPER.items():
        size = step_size(recipe(name), 1)
        plan = plan_memory(size, parse_bytes(gpu.memory))
        low, high, most = expect(replace(size, micro_batch=plan.micro_batch, recompute=plan.recompute), gpu)
        micro, speed = f"{plan.micro_batch}, recompute {plan.recompute}", f"{low:.0f} to {high:.0f}"
        rows.append((f"`{name}`", micro, speed, f"{most:.0f}", f"{rate}", hours(IMAGENET, 300, low, high)))
    return _table(rows)


CLUSTERS = ((8, 2048), (64, 2048), (1024, 2048), (1024, 32768))
"""GPUs and global batch: the paper's batch, and its 32 images per GPU where 1,024 GPUs would have two each."""


def scaling_table(images: int, link: str = "400Gb", rate: float = 1000.0) -> str:
    """A table of docs/scaling.md: ViT-B on several GPUs that each train at a round rate."""
    columns = []
    for gpus, batch in CLUSTERS:
        config = RunConfig(model=ModelConfig.preset("base"), optim=OptimConfig(global_batch=batch))
        columns.append(scaling_rows(config, gpus, parse_link(link), images, rate))
    header = "computed", *(f"{gpus:,} GPUs, batch {batch:,}" for gpus, batch in CLUSTERS)
    rows = [(cells[0][0], *(value for _, value in cells)) for cells in zip(*columns, strict=True)]
    return _table([header, ["---"] * len(header), *rows])


def _table(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(speed_table(), scaling_table(IMAGENET), scaling_table(10**9), sep="\n\n")
