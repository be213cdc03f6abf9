"""Kernels of masked and permuted attention, token embedding and k-means. Needs torch (and triton), never mapet."""

from mapet_kernels.kmeans_assign import kmeans_assign
from mapet_kernels.kmeans_update import kmeans_update
from mapet_kernels.permuted_embed import permuted_embed
from mapet_kernels.prefix_suffix_attention import prefix_suffix_attention
from mapet_kernels.two_stream_attention import two_stream_attention, two_stream_attention_packed

__all__ = [
    "kmeans_assign",
    "kmeans_update",
    "permuted_embed",
    "prefix_suffix_attention",
    "two_stream_attention",
    "two_stream_attention_packed",
]
