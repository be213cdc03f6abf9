"""The loss curve of one or more runs, beside what guessing would give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    ordered = [records[step] for step in sorted(records)]
    # A value that was not finite is logged as null.
    numbers = [[record.get(name) for record in ordered] for name in ("loss", "accuracy", "lr")]
    return Curve(np.array(sorted(records)), *np.array(numbers, dtype=float))


def draw_loss_curve(path: str | Path, runs: Mapping[str, Curve], *, vocabulary: int, token_entropy: float) -> Path:
    """Draw loss, accuracy and learning rate of runs by name, the logged values faintly and their running mean.

    Args:
        vocabulary: number of tokens; a uniform guess has the loss ln(vocabulary).
        token_entropy: of the training tokens' frequencies in nats, the loss of a guess that knows these.
    """
    figure = Figure(figsize=(8.6, 7.4), layout="constrained")
    loss, accuracy, lr = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 1])
    for i, (name, curve) in enumerate(runs.items()):
        colour, reach = CYCLE[i % len(CYCLE)], len(curve.step) // 100
        for axes, values, label in ((loss, curve.loss, name), (accuracy, 100 * curve.accuracy, None)):
            axes.plot(curve.step, values, color=colour, linewidth=0.8, alpha=0.25)
            axes.plot(curve.step, smooth(values, reach), color=colour, linewidth=1.8, label=label)
        lr.plot(curve.step, curve.lr, color=colour, linewidth=1.4)
    uniform = math.log(vocabulary)
    guess = {"color": INK, "linewidth": 1.2, "zorder": 1}
    loss.axhline(uniform, linestyle="--", label=f"uniform guess, ln {vocabulary} = {uniform:.2f}", **guess)
    loss.axhline(token_entropy, linestyle=":", label=f"guess by token frequency, {token_entropy:.2f}", **guess)
    accuracy.axhline(100 / vocabulary, linestyle="--", **guess)
    frame(loss, "y", title="Pre-training: predicting visual tokens", y="loss (nats a token)")
    frame(accuracy, "y", y="accuracy (%)")
    frame(lr, "y", x="optimizer step", y="learning rate")
    for axes in (loss, accuracy, lr):
        axes.margins(x=0.01)
    accuracy.set_ylim(bottom=0)
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    loss.legend(frameon=False, fontsize=9, labelcolor=INK)
    return save(figure, path)


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of the finite values at most `reach` places away, at every place; NaN where there is none."""
    window, finite = np.ones(2 * reach + 1), np.isfinite(values)
    totals, counts = (np.convolve(part, window, "same") for part in (np.where(finite, values, 0.0), finite))
    return np.divide(totals, counts, out=np.full(len(values), math.nan), where=counts > 0.5)
