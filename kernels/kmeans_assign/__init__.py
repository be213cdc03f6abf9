"""Nearest centroid of every row."""

from mapet_kernels.kmeans_assign.op import kmeans_assign

__all__ = ["kmeans_assign"]
