"""From images and permutations to the flat token buffer."""

from mapet_kernels.permuted_embed.op import permuted_embed

__all__ = ["permuted_embed"]
