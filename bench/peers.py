"""What users would take instead: for two-stream attention its peers, for the step timm's plain ViT as context.

`python -m bench attention` sweeps lengths, cuts and heads over the same ways and draws them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from bench import options, roofline, step
from bench.attention_ways import FLEX_SETTINGS, OURS, Operands, Way, builders, own_backends, random_operands
from bench.contest import Arena, Contest, Entrant, timed_call
from bench.equal_results import yardstick
from bench.options import DTYPES
from bench.timing import PHASES, sample
from mapet.training.learner import AUTOCAST
from mapet.training.optim import clip_gradients, make_optimizer
from mapet_kernels.backends import TWO_STREAM_BACKENDS, choose_backend
from mapet_kernels.registry import TwoStreamShape

CLASSES = 1000


def contests(chosen: options.Options, device: torch.device) -> list[Contest]:
    """For each combination of sizes, attention and the step."""
    found = []
    for sizes in options.combinations(chosen, device):
        found += [attention(sizes, device), plain_vit(step.Setting(sizes, device, chosen.jitter, chosen.gpu_memory))]
    return found


def attention(sizes: options.Sizes, device: torch.device) -> Contest:
    """Two-stream attention of one block, forward and backward, by every way that `python -m bench attention` knows."""
    model = sizes.model
    shape = TwoStreamShape(model.tokens, sizes.cut, sizes.batch, model.heads, model.head_size)
    flex = [name for name, setting in FLEX_SETTINGS.items() if not setting.autotune]
    own = [OURS + name for name in own_backends()]
    ways = (*own, "sdpa_mask", "xformers_bias", *flex, "official", "official_with_masks")
    base = OURS + choose_backend("auto", device, DTYPES[sizes.dtype], TWO_STREAM_BACKENDS, model.head_size)
    return Contest(
        "peers", f"attention {sizes.name}", sizes.record() | {"heads": model.heads, "size": model.head_size}, PHASES,
        ways, base, sizes.dtype, partial(attention_arena, shape, DTYPES[sizes.dtype], device),
    )  # fmt: skip


@contextmanager
def attention_arena(shape: TwoStreamShape, dtype: torch.dtype, device: torch.device) -> Iterator[Arena]:
    """Operands that all ways share, and their float64 results."""
    operands = random_operands(shape, dtype, device)
    reference = yardstick(operands)
    ways = {name: partial(attention_entrant, build, operands) for name, build in builders().items()}
    yield Arena(ways, reference.errors, roofline.costs(shape, dtype))


def attention_entrant(build, operands: Operands) -> Entrant:
    """A way of bench.attention_ways."""
    way: Way = build(operands)
    return Entrant(lambda clock: sample(way, clock), way.results, way.results)


def plain_vit(setting: step.Setting) -> Contest:
    """Our step beside a supervised step of timm's ViT of the same size: half the tokens and another task."""
    sizes = setting.sizes.record() | {"jitter": setting.jitter}
    return Contest(
        "peers", f"step {setting.sizes.name}", sizes, ("step",), ("ours", "timm_vit"), "ours", setting.sizes.dtype,
        partial(vit_arena, setting),
    )  # fmt: skip


@contextmanager
def vit_arena(setting: step.Setting) -> Iterator[Arena]:
    """Ours as in the step suite, checked to be finite, and timm's ViT."""
    ways = {"ours": lambda: step.ours(setting, setting.config), "timm_vit": lambda: timm_vit(setting)}
    yield Arena(ways, step.Judge(setting.sizes.dtype), images=setting.sizes.batch)


def timm_vit(setting: step.Setting) -> Entrant:
    """Cross-entropy over 1000 classes, with our optimizer and clipping; images are normalised, not jittered."""
    from timm.models.vision_transformer import VisionTransformer

    config, model = setting.config, setting.sizes.model
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=model.image_size, patch_size=model.patch_size, embed_dim=model.width, depth=model.depth,
        num_heads=model.heads, mlp_ratio=model.mlp_ratio, num_classes=CLASSES, drop_path_rate=model.drop_path,
    ).to(setting.device)  # fmt: skip
    optimizer = make_optimizer(network, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = config.optim.warmup_lr
    scaler = torch.amp.GradScaler(setting.device.type, enabled=config.train.precision == "fp16")
    labels = torch.randint(0, CLASSES, (setting.sizes.batch,), device=setting.device)
    dtype = AUTOCAST.get(config.train.precision)
    deviation, mean = 0.225 * 255, 0.45 * 255

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        images = (setting.batch.images - mean) / deviation
        with torch.autocast(setting.device.type, dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(network(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_gradients(network.parameters(), config.optim.clip)
        scaler.step(optimizer)
        scaler.update()

    return Entrant(
        timed_call("step", once), once=once, resident=lambda: step.resident(network, optimizer),
        another_task="another task: supervised classification by timm's plain ViT",
    )  # fmt: skip
