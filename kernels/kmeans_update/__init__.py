"""Sum and count of the rows of every cluster."""

from mapet_kernels.kmeans_update.op import kmeans_update

__all__ = ["kmeans_update"]
