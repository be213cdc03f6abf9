"""docs/scaling.md, made from mapet/planning/scaling.py: `python -m mapet.planning.scaling_page > docs/scaling.md`."""

from __future__ import annotations

from mapet.config import ModelConfig
from mapet.planning.scaling import Cluster, scaling_rows
from mapet.units import parse_link

LINK = "400Gb"
RATE = 1000.0
DATA = {"ImageNet-1k": 1_281_167, "a billion images": 10**9}
CLUSTERS = ((8, 2048), (64, 2048), (1024, 2048), (1024, 32768))
"""GPUs and global batch: the paper's batch, and its 32 images per GPU where 1,024 GPUs would have two each."""

INTRODUCTION = f"""# More GPUs, on paper

Everything on this page is computed, not measured: no run with more than one GPU stands behind it. The formulas are in
`mapet/planning/scaling.py`; `python -m mapet.planning.scaling_page` prints this page, and a test compares the two.

Assumed: ViT-B at 224 pixels, a link of {LINK} per second for each GPU, no latency, gradients reduced in fp32 by a ring,
and one GPU that trains {RATE:g} images per second. That rate is a round number to calculate with, not a result; put in
your own:

    mapet plan --model base --gpus 64 --interconnect {LINK} --images 1.28M --images-per-second RATE

At 1,024 GPUs the paper's batch of 2048 leaves two images to each, and the all-reduce is most of the step; with 32
images each, as in the paper, the batch is 32,768, for which the learning rate has to be found anew.
"""


def page() -> str:
    """The whole page."""
    model = ModelConfig.preset("base")
    parts = [INTRODUCTION]
    for data, images in DATA.items():
        clusters = [Cluster(gpus, parse_link(LINK), batch, images, RATE) for gpus, batch in CLUSTERS]
        columns = [dict(scaling_rows(model, cluster)) for cluster in clusters]
        parts.append(f"## {data[0].upper() + data[1:]}\n")
        parts.append(_row("computed", *(f"{c.gpus:,} GPUs, batch {c.global_batch:,}" for c in clusters)))
        parts.append(_row(*["---"] * (len(clusters) + 1)))
        parts += [_row(name, *(column[name] for column in columns)) for name in columns[0]]
        parts.append("")
    return "\n".join(parts)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page(), end="")
