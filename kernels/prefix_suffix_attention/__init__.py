"""Attention of one stream under the prefix-suffix rule."""

from mapet_kernels.prefix_suffix_attention.op import prefix_suffix_attention

__all__ = ["prefix_suffix_attention"]
