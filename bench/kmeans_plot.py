"""A picture of a record of `python -m bench kmeans`: speed of every way by size, and rows that are decided again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mapet.report.picture import CYCLE, INK, frame, save

NAMES = {
    "exact": "ours, exact ids",
    "fast": "ours, fast",
    "torch_chunked": "torch, chunked",
    "flash_kmeans": "flash-kmeans",
    "faiss_gpu": "faiss, GPU",
}


def draw(path: Path) -> Path:
    """Draw one record; returns the picture's path, the record's with .png.

    Raises:
        ValueError: the file is no k-means record.
    """
    record = json.loads(Path(path).read_text())
    if record.get("suite") != "kmeans":
        raise ValueError(f"{path} is no record of `python -m bench kmeans`")
    sizes = record["sizes"]
    ways = [name for name in NAMES if any(name in size["ways"] for size in sizes)]
    on_gpu = record["device_type"] == "cuda"
    factor, unit = (1.0, "TFLOP/s") if on_gpu else (1e3, "GFLOP/s")
    figure = Figure(figsize=(max(7.0, 1.5 * len(sizes) + 3), 7.5), layout="constrained")
    speed, again = figure.subplots(2, 1, height_ratios=(2, 1), sharex=True)
    width = 0.8 / len(ways)
    places = np.arange(len(sizes))
    for i, (name, colour) in enumerate(zip(ways, CYCLE, strict=False)):
        heights = [factor * size["ways"].get(name, {}).get("tflops", 0.0) for size in sizes]
        left = places + (i - (len(ways) - 1) / 2) * width
        speed.bar(left, heights, width * 0.92, color=colour, label=NAMES[name])
    few, many = ([100 * size["redecided_share"][kind] for size in sizes] for kind in ("among_few", "among_all"))
    again.bar(places, few, 0.5, color=CYCLE[0], label="among a few candidates")
    again.bar(places, many, 0.5, bottom=few, color=CYCLE[1], label="among all centroids")
    again.set_xticks(places, [f"D {size['features']}\nK {size['clusters']:,}" for size in sizes])
    for axes, words in ((speed, f"products, {unit}"), (again, "rows decided again, %")):
        axes.set_ylabel(words, color=INK)
        frame(axes, "y")
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    device = record["device"] if on_gpu else f"CPU, {record['device']}, {record['threads']} threads"
    figure.suptitle(
        f"Nearest centroid of {record['rows']:,} rows on {device}, {record['dtype']}\n"
        f"torch {record['versions']['torch']}, {record['time'][:10]}, commit {record['commit'][:7]}",
        x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold",
    )  # fmt: skip
    return save(figure, Path(path).with_suffix(".png"), dpi=120)
