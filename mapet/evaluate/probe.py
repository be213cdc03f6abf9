"""Linear classifiers on frozen features: the paper's probe, and logistic regression for small or few-label sets.

The paper's probe, after BEiT's linear evaluation, puts one linear classifier on every block and trains them together.
It trains on random crops; here the features are cached, so by default every epoch sees the one centre crop. Features
of several random views (`mapet.evaluate.images.RandomViews`) can be given instead: epoch e takes view e modulo their
number.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from mapet.checked import check_fields
from mapet.config import BatchSize, Count, PositiveRate, Rate, Seed
from mapet.evaluate.features import Features


@dataclass(frozen=True)
class ProbeConfig:
    """The paper's linear probe: AdamW, cosine to 0 per epoch, no warm-up.

    The values are for ImageNet. On a few thousand images they are some hundred steps, too few to fit features of small
    variance; take a smaller batch there.
    """

    epochs: Count = 50
    batch: BatchSize = 1024
    lr: PositiveRate = 4e-3
    weight_decay: Rate = 1e-4
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "probe.")


@dataclass(frozen=True)
class LinearProbeResult:
    """Test accuracy of every layer's classifier after every epoch."""

    layers: tuple[str, ...]
    accuracy: np.ndarray
    """(epochs, L) top-1 in [0, 1]."""

    @property
    def best(self) -> float:
        """The largest over layers and epochs, which BEiT reports; chosen on the test images, so optimistic."""
        return float(self.accuracy.max())

    @property
    def best_layer(self) -> str:
        """The layer that `best` is from."""
        return self.layers[int(self.accuracy.max(axis=0).argmax())]

    @property
    def last(self) -> float:
        """The last layer after the last epoch; nothing is chosen."""
        return float(self.accuracy[-1, -1])


class LayerClassifiers(nn.Module):
    """One linear classifier per layer: (b, L, F) -> (L, b, C). Weights N(0, 0.01), biases 0."""

    def __init__(self, layers: int, width: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layers, width, classes, generator=generator) * 0.01)
        self.bias = nn.Parameter(torch.zeros(layers, 1, classes))

    def forward(self, features: Tensor) -> Tensor:
        """Logits of every layer."""
        # (L, 1, C) + (L, b, F) @ (L, F, C) -> (L, b, C)
        return torch.baddbmm(self.bias, features.transpose(0, 1), self.weight)


def linear_probe(
    train: Features | Sequence[Features],
    train_labels: np.ndarray,
    test: Features,
    test_labels: np.ndarray,
    *,
    config: ProbeConfig | None = None,
    device: str | torch.device = "cpu",
) -> LinearProbeResult:
    """The paper's linear probe on frozen features.

    Args:
        train: features of the training images, or of several random views of them.
        train_labels, test_labels: int64 (n,) and (m,); every test class must occur in training.
    """
    config = config or ProbeConfig()
    views = [train] if isinstance(train, Features) else list(train)
    classes, targets = np.unique(train_labels, return_inverse=True)
    test_targets = torch.from_numpy(np.searchsorted(classes, test_labels)).to(device)
    targets = torch.from_numpy(targets)
    generator = torch.Generator().manual_seed(config.seed)
    _, layers, width = views[0].values.shape
    model = LayerClassifiers(layers, width, len(classes), generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    accuracy = []
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = 0.5 * config.lr * (1 + math.cos(math.pi * epoch / config.epochs))
        for ids in torch.randperm(len(targets), generator=generator).split(config.batch):
            logits, labels = model(_rows(views[epoch % len(views)], ids.numpy(), device)), targets[ids].to(device)
            optimizer.zero_grad()
            sum(F.cross_entropy(layer, labels) for layer in logits).backward()
            optimizer.step()
        accuracy.append(_layer_accuracy(model, test, test_targets, config.batch, device))
    return LinearProbeResult(test.layers, np.stack(accuracy))


def logistic_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    regularization: float = 1.0,
    max_iterations: int = 2000,
) -> float:
    """Top-1 accuracy in [0, 1] of L2-regularised logistic regression on standardised features (n, F).

    `regularization` is the strength of the L2 penalty (1 / C of scikit-learn). It warns where it has not converged.
    """
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1 / regularization, max_iter=max_iterations))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        pipeline.fit(train, train_labels)
    if any(issubclass(w.category, ConvergenceWarning) for w in caught):
        warnings.warn(f"logistic regression did not converge in {max_iterations} iterations", stacklevel=2)
    return float(pipeline.score(test, test_labels))


@torch.no_grad()
def _layer_accuracy(
    model: LayerClassifiers, test: Features, targets: Tensor, batch: int, device: str | torch.device
) -> np.ndarray:
    correct = torch.zeros(len(test.layers), device=device)
    for start in range(0, len(test), batch):
        logits = model(_rows(test, slice(start, start + batch), device))
        correct += (logits.argmax(dim=-1) == targets[start : start + batch]).sum(dim=1)
    return (correct / len(test)).cpu().numpy()


def _rows(features: Features, which: np.ndarray | slice, device: str | torch.device) -> Tensor:
    # A copy, because a mapped file is read-only.
    return torch.tensor(np.asarray(features.values[which]), device=device)
