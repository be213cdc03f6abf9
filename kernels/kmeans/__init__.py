"""Lloyd's k-means as the faiss library runs it: in memory, from files larger than memory, over several processes."""

from mapet_kernels.kmeans.estimator import KMeans, NotFittedError
from mapet_kernels.kmeans.lloyd import Iteration, KMeansResult, Settings, fit
from mapet_kernels.kmeans.npy import NpyRows
from mapet_kernels.kmeans.sources import Part, RowSource, Selection, TensorRows, share_of_rows

__all__ = [
    "Iteration",
    "KMeans",
    "KMeansResult",
    "NotFittedError",
    "NpyRows",
    "Part",
    "RowSource",
    "Selection",
    "Settings",
    "TensorRows",
    "fit",
    "share_of_rows",
]
