"""Accuracy of the nearest neighbours of frozen features: nothing is learned, so nothing can be tuned."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mapet.errors import ConfigError


def knn_predict(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
    chunk: int = 1024,
) -> np.ndarray:
    """Predicted labels (m,) of test (m, F) from train (n, F) and its labels (n,).

    The k training images of largest cosine similarity s vote with weight exp(s / temperature), as DINO does; k = 1
    takes the label of the nearest. Equal votes go to the smaller label.
    Raises ConfigError unless 1 <= k <= n and temperature > 0.
    """
    check_neighbours(k, len(train))
    if temperature <= 0:
        raise ConfigError(f"the kNN temperature must be positive, got {temperature}")
    present, places = np.unique(train_labels, return_inverse=True)
    votes_for = torch.from_numpy(places).to(device)
    bank = _unit(train, device)
    predicted = []
    for start in range(0, len(test), chunk):
        # (m, F) @ (F, n) -> (m, n)
        similarity, nearest = (_unit(test[start : start + chunk], device) @ bank.T).topk(k, dim=1)
        # Relative to the nearest, so that no exponential overflows.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(weights), len(present), device=device).scatter_add_(1, votes_for[nearest], weights)
        predicted.append(votes.argmax(dim=1).cpu())
    return present[torch.cat(predicted).numpy()]


def check_neighbours(k: int, images: int) -> None:
    """ConfigError unless there are as many training images as neighbours."""
    if not 1 <= k <= images:
        raise ConfigError(f"kNN needs 1 <= k <= {images} training images, got k = {k}")


def _unit(features: np.ndarray, device: str | torch.device) -> Tensor:
    # A mapped file is read-only, and torch wants to own what it may write.
    return F.normalize(torch.tensor(np.asarray(features), dtype=torch.float32, device=device), dim=1)
