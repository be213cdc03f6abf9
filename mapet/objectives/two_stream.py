"""What a pre-training objective is: a layout of streams, an attention over it, and how a step's randomness is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mapet.config import ModelConfig, Recompute, SpeedConfig, check_cut
from mapet.model.stochastic_depth import kept_images
from mapet.model.streams import StreamLayout
from mapet.model.vit import Keep, MaskedTokenViT, drop_path_rates
from mapet.objectives.loss import token_accuracy, token_cross_entropy, whole_cross_entropy

EMBEDDING_BACKENDS = ("auto", "triton", "cuda")
"""Backends that the embedding has as well as attention."""

RECOMPUTED_AT_ONCE = 128
"""Images whose block is recomputed at a time, at most: all activations of one block exist for so many images only."""


@dataclass(frozen=True)
class Plan:
    """Everything random in one forward pass over B images; `plan[a:b]` is the plan of images a to b.

    permutation: int64 (B, N), the token at rank r; a class token, token 0, has rank 0.
    keep: float32 (depth, 2, B), factors of the residual branches: 0 for a dropped image, 1 / (1 - rate) for a kept one.
    """

    permutation: Tensor
    keep: Tensor

    def __getitem__(self, images: slice) -> Plan:
        return Plan(self.permutation[images], self.keep[:, :, images])


class Objective(nn.Module, ABC):
    """A model and the loss it is pre-trained with. One subclass and one file per method.

    Args:
        config: the network.
        cut: tokens that are not predicted, the class token included; in [1, N - 1].
        backend: of attention, in mapet_kernels; the embedding is in plain torch unless it is in EMBEDDING_BACKENDS.
        recompute: see MaskedTokenViT. With "blocks" images go through the network in parts.
        speed: switches of a fast step; chunked_head is read here.
    """

    def __init__(
        self,
        config: ModelConfig,
        cut: int,
        *,
        backend: str = "auto",
        recompute: Recompute = "none",
        speed: SpeedConfig | None = None,
    ) -> None:
        super().__init__()
        check_cut(cut, config.tokens)
        self.config, self.cut, self.backend, self.speed = config, cut, backend, speed or SpeedConfig()
        self.model = MaskedTokenViT(config, recompute=recompute, speed=self.speed)

    @abstractmethod
    def layout(self, batch: int) -> StreamLayout:
        """The row groups of this objective's buffer."""

    @abstractmethod
    def attention(self, q: Tensor, kv: Tensor, layout: StreamLayout) -> Tensor:
        """Attention of q (R, H, d), all rows or the predicted ones, over kv (B, content_rows, 2, H, d)."""

    def sample_plan(
        self,
        batch: int,
        generator: torch.Generator,
        device: torch.device | str,
        host_generator: torch.Generator | None = None,
    ) -> Plan:
        """Uniform permutations of the patches and drop-path draws, from `generator` (on `device`) alone.

        Both streams of an image share its drop-path draw (official code). With `host_generator` these draws come from
        it and stay on the host.
        """
        first = int(self.config.class_token)
        order = torch.rand(batch, self.config.patches, generator=generator, device=device).argsort(dim=1)
        permutation = torch.nn.functional.pad(order + first, (first, 0))
        if host_generator is not None:
            generator, device = host_generator, "cpu"
        kept = 1 - drop_path_rates(self.config).to(device).view(-1, 1, 1)
        draws = torch.rand(self.config.depth, 2, batch, generator=generator, device=device)
        return Plan(permutation, (draws < kept) / kept)

    def kept(self, keep: Tensor, device: torch.device | str) -> tuple[Keep, ...]:
        """The images whose work is done, for `forward`, from factors (depth, 2, B) on the host."""
        return tuple(kept_images(keep[:, :, part], device) for part in self.parts(keep.shape[2]))

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
        """Features (B * T, D) before the head, by image and then by target in permuted order."""
        parts = self.parts(images.shape[0])
        if keep is None:
            keep = (None,) * len(parts)
        elif isinstance(keep, Tensor):
            keep = tuple(keep[:, :, part] for part in parts)
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

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        permutation: Tensor,
        keep: Tensor | tuple[Keep, ...] | None = None,
        with_accuracy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over all targets (nats), and the share of targets predicted right.

        Args:
            images: (B, 3, S, S), uint8, or floating point in [0, 1].
            tokens: int64 (B, P), raster order, in [0, vocabulary).
            permutation: that of a Plan.
            keep: that of a Plan, which multiplies; or `kept` of it, which leaves dropped work out; None drops nothing.
            with_accuracy: False returns NaN in its place and saves a pass through the head.

        Returns:
            (loss, accuracy), scalars; only the loss has a gradient.
        """
        features = self.predictions(images, permutation, keep)
        targets = self.targets(tokens, permutation)
        head = self.model.decoder
        cross_entropy = token_cross_entropy if self.speed.chunked_head else whole_cross_entropy
        loss = cross_entropy(features, head.weight, head.bias, targets)
        if not with_accuracy:
            return loss, torch.full_like(loss.detach(), float("nan"))
        return loss, token_accuracy(features.detach(), head.weight.detach(), head.bias.detach(), targets)


def part_size(images: int) -> int:
    """Images of a part when blocks are recomputed: RECOMPUTED_AT_ONCE at most, in few parts, as even as can be."""
    return -(-images // -(-images // RECOMPUTED_AT_ONCE))
