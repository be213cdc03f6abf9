"""What several GPUs would do, on paper: traffic, all-reduce, data rate and storage. Nothing here is measured.

With n GPUs, P parameters, a global batch of G images, S pixels a side, A patches, and a link of w bytes per second
between neighbours of the ring (one link per GPU, its slowest):

    gradients of a step          4 P bytes                    DDP reduces them in fp32
    sent by each GPU             2 (n - 1) / n * 4 P          ring all-reduce: reduce-scatter, then all-gather
    time of the all-reduce       2 (n - 1) / n * 4 P / w      latency left out: a lower bound
    one image in the cache       3 S S + 2 A bytes            uint8 pixels, uint16 tokens
    storage                      images * bytes of one
    steps of an epoch            images // G

and, where the images per second r of one GPU are known (its own share, without communication):

    computing a step             G / (n r)
    a step                       between max(computing, all-reduce), all of it hidden, and their sum, none of it
    reading, all GPUs together   G * bytes of one image / the shorter of these steps
    an epoch                     steps * time of a step
"""

from __future__ import annotations

from dataclasses import dataclass

from mapet.config import ModelConfig
from mapet.errors import ConfigError
from mapet.planning.memory import FP32, parameters
from mapet.units import duration, metric


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


@dataclass(frozen=True)
class Scaling:
    """Bytes and seconds; see the top of the file. None where the rate of one GPU is not known."""

    share: int
    gradient_bytes: int
    sent_bytes: float
    reduce_seconds: float
    image_bytes: int
    storage_bytes: int
    steps: int
    compute_seconds: float | None
    step_seconds: tuple[float, float] | None
    read_bytes: float | None
    epoch_seconds: tuple[float, float] | None


def scale(model: ModelConfig, cluster: Cluster) -> Scaling:
    """The arithmetic at the top of the file."""
    gpus, batch = cluster.gpus, cluster.global_batch
    gradients = FP32 * parameters(model)
    sent = 2 * (gpus - 1) / gpus * gradients
    reduce_seconds = sent / cluster.link
    image = 3 * model.image_size**2 + 2 * model.patches
    steps = cluster.images // batch
    compute = batch / (gpus * cluster.rate) if cluster.rate else None
    step = (max(compute, reduce_seconds), compute + reduce_seconds) if compute else None
    return Scaling(
        share=batch // gpus,
        gradient_bytes=gradients,
        sent_bytes=sent,
        reduce_seconds=reduce_seconds,
        image_bytes=image,
        storage_bytes=cluster.images * image,
        steps=steps,
        compute_seconds=compute,
        step_seconds=step,
        read_bytes=batch * image / step[0] if step else None,
        epoch_seconds=(steps * step[0], steps * step[1]) if step else None,
    )


def scaling_rows(model: ModelConfig, cluster: Cluster) -> list[tuple[str, str]]:
    """What is computed, and its value, for people."""
    result = scale(model, cluster)
    unknown = "unknown: give --images-per-second of one GPU, measured"
    rows = [
        ("images of one GPU in a step", f"{result.share:,}"),
        ("gradients of a step", metric(result.gradient_bytes, "B")),
        ("sent by each GPU in a step", metric(result.sent_bytes, "B")),
        ("ring all-reduce, without latency", duration(result.reduce_seconds)),
        ("one image in the cache", metric(result.image_bytes, "B")),
        ("storage of the cache", metric(result.storage_bytes, "B")),
        ("steps of an epoch", f"{result.steps:,}"),
        ("computing a step", unknown),
    ]
    if result.step_seconds is None:
        return rows
    return [
        *rows[:-1],
        ("computing a step", duration(result.compute_seconds)),
        ("a step, all-reduce hidden or not", between(result.step_seconds)),
        ("reading, all GPUs together", f"{metric(result.read_bytes, 'B')}/s"),
        ("an epoch, all-reduce hidden or not", between(result.epoch_seconds)),
    ]


def between(bounds: tuple[float, float]) -> str:
    """A range of durations; one where both read alike."""
    low, high = map(duration, bounds)
    return low if low == high else f"{low} to {high}"
