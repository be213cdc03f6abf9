"""Kernels of masked and permuted attention, token embedding and k-means. Needs torch (and triton), never mapet."""

from mapet_kernels.kmeans_assign import kmeans_assign
from mapet_kernels.kmeans_update import kmeans_update

__all__ = ["kmeans_assign", "kmeans_update"]
