"""The two-stream family: a layout of streams over one flat token buffer, an attention over it, tokens predicted."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from mapet.config import ModelConfig, ObjectiveConfig, RunConfig, short
from mapet.data.augment import JitterDraws, color_jitter, sample_color_jitter
from mapet.errors import ConfigError, FieldError
from mapet.model.official_names import PRETRAINING_ONLY
from mapet.model.stochastic_depth import kept_images
from mapet.model.streams import StreamLayout
from mapet.model.vit import Keep, MaskedTokenViT, drop_path_rates
from mapet.objectives.loss import token_accuracy, token_cross_entropy
from mapet.rng import StepRng
from mapet.task import Batch, Draws, Task
from mapet_kernels.backends import TWO_STREAM_BACKENDS, choose_backend
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.selfcheck import two_stream_agreement

if TYPE_CHECKING:
    from mapet.data.cache import TokenCache

EMBEDDING_BACKENDS = ("auto", "triton", "cuda")
"""Backends that the embedding has as well as attention."""

RECOMPUTED_AT_ONCE = 128
"""Images whose block is recomputed at a time, at most: all activations of one block exist for so many images only."""


@dataclass(frozen=True)
class CutConfig(ObjectiveConfig):
    """Options of the methods that cut a permutation in two."""

    cut: Annotated[int, short("--cut")] = 50
    """Tokens that are not predicted, the class token included (the paper's c: 50 for ViT-T and ViT-S, 60 for ViT-B)."""

    def check_model(self, model: ModelConfig) -> None:
        """FieldError unless 1 <= cut <= N - 1 (paper, section 4.1: c in [1, N - 1])."""
        if not 1 <= self.cut <= model.tokens - 1:
            raise FieldError(
                "objective.cut",
                f"objective.cut must be in [1, {model.tokens - 1}] with {model.tokens} tokens an image, got {self.cut}",
            )


class TwoStreamTask(Task):
    """Visual tokens of the targets, which come last in a random permutation, are predicted from what they may see.

    A method is a subclass with its layout and its attention.

    Draws, for B images:
        permutation: int64 (B, N), the token at rank r; a class token, token 0, has rank 0.
        keep: float32 (B, depth, 2), factors of the residual branches: 0 for a dropped image, 1 / (1 - rate) for a kept
            one; on the host where the work of dropped images is left out. Only where model.drop_path is not 0.
        factors, order: of the colour jitter, see `JitterDraws`. Only where data.color_jitter is not 0.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.backend, self.color_jitter = config.train.backend, config.data.color_jitter
        speed = config.speed
        # Their number differs from step to step, which makes a program of its own of each when compiling, and which a
        # recording cannot follow.
        self.skips_dropped = speed.skip_dropped and not speed.compile and not speed.cuda_graphs
        self.model = MaskedTokenViT(self.config, recompute=config.train.recomputed, fp8=speed.fp8)

    @property
    def cut(self) -> int:
        """Tokens that are not predicted, the class token included."""
        return self.options.cut

    @abstractmethod
    def layout(self, batch: int) -> StreamLayout:
        """The row groups of this method's buffer."""

    @abstractmethod
    def attention(self, q: Tensor, kv: Tensor, layout: StreamLayout) -> Tensor:
        """Attention of q (R, H, d), all rows or the predicted ones, over kv (B, content_rows, 2, H, d)."""

    @classmethod
    def open(cls, config: RunConfig) -> TokenCache:
        from mapet.data.cache import TokenCache  # images need packages that a bare GPU machine may lack

        cache = TokenCache.open(config.data.cache)
        cache.check_model(config.model)
        return cache

    def draw(self, images: int, rng: StepRng) -> Draws:
        """See the class. Both streams of an image share its drop-path draw (official code)."""
        first, device = int(self.config.class_token), rng.device
        order = torch.rand(images, self.config.patches, generator=rng.generator("plan"), device=device).argsort(dim=1)
        draws = {"permutation": nn.functional.pad(order + first, (first, 0))}
        if self.training and self.config.drop_path:
            kept = 1 - drop_path_rates(self.config).view(-1, 1, 1)
            uniform = torch.rand(self.config.depth, 2, images, generator=rng.generator("drop_path", "cpu"))
            draws["keep"] = ((uniform < kept) / kept).permute(2, 0, 1)
        if self.training and self.color_jitter:
            jitter = sample_color_jitter(images, self.color_jitter, rng.generator("color_jitter", "cpu"), "cpu")
            draws |= {"factors": jitter.factors, "order": jitter.order}
        return draws

    def ready(self, draws: Draws, device: torch.device) -> dict[str, Any]:
        """With `keep` as the network takes it: factors, or for each part the images whose work is done."""
        on_host = {name: value for name, value in draws.items() if name == "keep" and self.skips_dropped}
        ready = super().ready({name: value for name, value in draws.items() if name not in on_host}, device)
        if on_host:
            ready["keep"] = self.kept(draws["keep"], device)
        return ready

    def forward(self, batch: Batch, draws: dict[str, Any], *, metrics: bool = True) -> dict[str, Tensor]:
        """Mean cross-entropy over all targets (nats), and the share of targets predicted right.

        Args:
            batch: images, uint8 (B, 3, S, S) or floating point in [0, 1]; tokens, int64 (B, P), in raster order.
            draws: see the class and `ready`.
        """
        images = self.jittered(batch["images"], draws)
        features = self.predictions(images, draws["permutation"], draws.get("keep"))
        targets = self.targets(batch["tokens"], draws["permutation"])
        head = self.model.decoder
        values = {"loss": token_cross_entropy(features, head.weight, head.bias, targets)}
        if metrics:
            values["accuracy"] = token_accuracy(features.detach(), head.weight.detach(), head.bias.detach(), targets)
        return values

    def jittered(self, images: Tensor, draws: dict[str, Any]) -> Tensor:
        """The images with their colours changed, where that was drawn."""
        return color_jitter(images, JitterDraws(draws["factors"], draws["order"])) if "factors" in draws else images

    def example(self, images: int) -> Batch:
        side = self.config.image_size
        return {
            "images": torch.empty(images, 3, side, side, dtype=torch.uint8),
            "tokens": torch.empty(images, self.config.patches, dtype=torch.int64),
        }

    def units(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def backbone(self) -> tuple[ModelConfig, dict[str, Tensor]]:
        weights = self.model.state_dict()
        return self.config, {name: value for name, value in weights.items() if name not in PRETRAINING_ONLY}

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """ConfigError when the backend cannot run, or on this GPU, at this run's sizes, disagrees with plain torch."""
        layout, size = self.layout(2), self.config.head_size
        try:
            choose_backend(self.backend, device, dtype, TWO_STREAM_BACKENDS, size)
        except ValueError as error:
            raise ConfigError(f"train.backend: {error}") from error
        if device.type != "cuda":
            return
        shape = TwoStreamShape(layout.tokens, layout.cut, batch=2, heads=2, size=size, mask_tokens=layout.mask_tokens)
        agreement = two_stream_agreement(self.backend, device, dtype, shape)
        if not agreement.holds:
            raise ConfigError(
                f"train.backend {self.backend} computes wrong attention on {device}: its errors are "
                f"{agreement.outputs:.1f} (outputs) and {agreement.gradients:.1f} (gradients) times what rounding in "
                f"{str(dtype).removeprefix('torch.')} explains; set train.backend sdpa, and please report this with "
                "the output of `mapet doctor`"
            )

    def kept(self, keep: Tensor, device: torch.device | str) -> tuple[Keep, ...]:
        """The images whose work is done, by part, from factors (B, depth, 2) on the host."""
        return tuple(kept_images(keep[part], device) for part in self.parts(len(keep)))

    def parts(self, images: int) -> list[slice]:
        """The images that go through the network at a time."""
        size = part_size(images) if self.model.recompute == "blocks" else images
        return [slice(first, min(first + size, images)) for first in range(0, images, size)]

    def predictions(
        self,
        images: Tensor,
        permutation: Tensor,
        keep: Tensor | tuple[Keep, ...] | None = None,
        *,
        normalise: bool = True,
    ) -> Tensor:
        """Features (B * T, D) before the head, by image and then by target in permuted order.

        keep: factors (B, depth, 2), which multiply, or `kept` of them, which leaves dropped work out; None drops none.
        """
        parts = self.parts(images.shape[0])
        if keep is None:
            keep = (None,) * len(parts)
        elif isinstance(keep, Tensor):
            keep = tuple(keep[part] for part in parts)
        features = [
            self._features(images[part], permutation[part], kept, normalise)
            for part, kept in zip(parts, keep, strict=True)
        ]
        return features[0] if len(features) == 1 else torch.cat(features)

    def _features(self, images: Tensor, permutation: Tensor, keep: Keep | None, normalise: bool) -> Tensor:
        layout = self.layout(images.shape[0])
        embedding = self.backend if self.backend in EMBEDDING_BACKENDS else "reference"
        x = self.model.embed(images, permutation, layout, normalise=normalise, backend=embedding)
        return self.model.encode(x, layout, keep, self.attention)

    def targets(self, tokens: Tensor, permutation: Tensor) -> Tensor:
        """Visual tokens (B * T,) of the targets in permuted order, from tokens (B, P) in raster order."""
        patches = permutation[:, self.cut :] - int(self.config.class_token)
        return tokens.gather(1, patches).flatten()


def part_size(images: int) -> int:
    """Images of a part when blocks are recomputed: RECOMPUTED_AT_ONCE at most, in few parts, as even as can be."""
    return -(-images // -(-images // RECOMPUTED_AT_ONCE))
