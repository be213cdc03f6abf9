"""The loss curve of one or more runs, beside what guessing would give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mapet.errors import DataError
from mapet.report.picture import CYCLE, INK, frame, save
from mapet.training.metrics import read_lines


@dataclass(frozen=True)
class Curve:
    """What a run logged, by optimizer step; NaN where a line does not have a number."""

    step: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    lr: np.ndarray


def read_metrics(path: str | Path) -> Curve:
    """Read metrics.jsonl: lines with step, loss and, where logged, accuracy and lr. Other lines are passed by.

    A step that a resumed run logged twice counts once, the later time. DataError where no line has a loss.
    """
    path = Path(path)
    records = {record["step"]: record for record in read_lines(path) if "loss" in record}
    if not records:
        raise DataError(f"{path} has no line with a step and a loss")
    steps = sorted(records)
    loss, accuracy, lr = (_column([records[s] for s in steps], name) for name in ("loss", "accuracy", "lr"))
    return Curve(np.array(steps), loss, accuracy, lr)


def _column(records: list[dict[str, float | None]], name: str) -> np.ndarray:
    """One number per record; absent and null (a value that was not finite) become NaN."""
    return np.array([math.nan if record.get(name) is None else record[name] for record in records], dtype=float)


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the token frequencies: the loss of a guess that knows how often every token occurs."""
    _, counts = np.unique(np.asarray(tokens), return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def draw_loss_curve(
    path: str | Path, runs: Mapping[str, Curve], *, vocabulary: int, token_entropy: float | None = None
) -> Path:
    """Draw loss, accuracy and learning rate of runs by name.

    Args:
        vocabulary: number of tokens; a uniform guess has the loss ln(vocabulary).
        token_entropy: `unigram_entropy` of the training tokens, in nats.
    """
    figure = Figure(figsize=(8.6, 7.4), layout="constrained")
    loss, accuracy, lr = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 1])
    for i, (name, curve) in enumerate(runs.items()):
        colour = CYCLE[i % len(CYCLE)]
        _draw_line(loss, curve.step, curve.loss, colour, name)
        _draw_line(accuracy, curve.step, 100 * curve.accuracy, colour)
        lr.plot(curve.step, curve.lr, color=colour, linewidth=1.4)
    references = [(math.log(vocabulary), f"uniform guess, ln {vocabulary} = {math.log(vocabulary):.2f}", "--")]
    if token_entropy is not None:
        references.append((token_entropy, f"guess by token frequency, {token_entropy:.2f}", ":"))
    for value, words, dashes in references:
        loss.axhline(value, color=INK, linewidth=1.2, linestyle=dashes, label=words, zorder=1)
    accuracy.axhline(100 / vocabulary, color=INK, linewidth=1.2, linestyle="--", zorder=1)
    for axes, name in ((loss, "loss (nats a token)"), (accuracy, "accuracy (%)"), (lr, "learning rate")):
        _style(axes, name)
    accuracy.set_ylim(bottom=0)
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lr.set_xlabel("optimizer step", color=INK)
    loss.legend(frameon=False, fontsize=9, labelcolor=INK)
    loss.set_title("Pre-training: predicting visual tokens", loc="left", fontsize=12, color=INK, fontweight="bold")
    return save(figure, path)


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of the finite values at most `reach` places away, at every place; NaN where there is none."""
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(values))
    first, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    count = counts[end] - counts[first]
    return np.divide(totals[end] - totals[first], count, out=np.full(len(values), math.nan), where=count > 0)


def _draw_line(axes: Axes, step: np.ndarray, values: np.ndarray, colour: str, name: str | None = None) -> None:
    """The logged values faintly, and their running mean."""
    axes.plot(step, values, color=colour, linewidth=0.8, alpha=0.25)
    axes.plot(step, smooth(values, len(values) // 100), color=colour, linewidth=1.8, label=name)


def _style(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, color=INK)
    frame(axes, "y")
    axes.margins(x=0.01)
