"""`mapet plan`."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from rich.console import Console
from rich.table import Table

from mapet.commands.options import Plan as Options
from mapet.config import Parallel, RunConfig, change
from mapet.planning.estimate import GPUS, Gpu, expectation_rows, gpu_of, scaling_rows
from mapet.planning.memory import LEVELS, USABLE, Memory, Plan, plan_run, predict_memory, step_size
from mapet.units import gib, parse_count, parse_link
from mapet.words import say

PARTS = {
    "weights": "fp32 weights",
    "gradients": "their gradients",
    "optimizer": "AdamW's two moments",
    "average": "moving average of the weights",
    "images": "images and tokens of the step",
    "activations": "activations: residual stream, norms, MLP",
    "attention": "attention: q, kv, result, log-sum-exp",
    "head": "after the last block: head, loss, gradients",
    "temporary": "gradients of activations, recomputed parts",
    "workspace": "workspace of cuBLAS",
}


def run(options: Options) -> int:
    """Print the plan, with --gpu how fast it would be, with --interconnect what several GPUs would do.

    ConfigError where nothing fits.
    """
    # What is wrong is said before what takes seconds.
    gpu, link = gpu_of(options.gpu, options.peak, options.bandwidth), parse_link(options.interconnect or "1Gb")
    parse_count(options.images)
    config = plan_config(options)
    if gpu:
        gpu.operations(config.train.precision)
    plan = plan_run(config, options.gpus)
    console = Console()
    console.print(memory_table(plan.memory))
    say("\n".join(summary(config, options, plan)))
    if gpu:
        console.print(expectation_table(config, options, plan, gpu))
    if options.interconnect:
        console.print(scaling_table(config, options, link))
    return 0


def plan_config(options: Options) -> RunConfig:
    """The configuration that the options give, with a GPU's own memory as the limit where none is given."""
    if options.gpu and not options.run.train.gpu_memory:
        return change(options.run, {"train.gpu_memory": GPUS[options.gpu].memory})
    return options.run


def memory_table(memory: Memory) -> Table:
    """The parts of the peak."""
    table = Table("at the peak of a step", "predicted", title="mapet plan", title_justify="left", show_edge=False)
    table.columns[1].justify = "right"
    for name, value in memory.parts().items():
        if value:
            table.add_row(PARTS[name], gib(value))
    table.add_section()
    table.add_row(f"in all (reached at: {memory.moment})", gib(memory.total))
    return table


def summary(config: RunConfig, options: Options, plan: Plan) -> list[str]:
    """The choice in words, and how to run it."""
    share = plan.micro_batch * plan.accumulation
    lines = [
        f"micro-batch {plan.micro_batch}, accumulation {plan.accumulation}, recompute {plan.recompute}, "
        f"GPUs: {options.gpus}, each with {share} images of a step",
        "computed, not measured; for eager mode and without the memory of the CUDA context",
    ]
    if config.train.precision == "auto":
        lines.append("precision auto: bf16 on a GPU of compute capability 8.0 or newer, else fp16, which takes as much")
    size = replace(step_size(config, options.gpus), micro_batch=plan.micro_batch)
    levels = [f"{level} {gib(predict_memory(replace(size, recompute=level)).total)}" for level in LEVELS]
    lines.append(f"this micro-batch at each level: {', '.join(levels)}")
    if options.gpus > 1:
        size = replace(size, recompute=plan.recompute)
        ways = [f"{way} {gib(predict_memory(replace(size, parallel=way)).total)}" for way in get_args(Parallel)]
        lines.append(f"weights and optimizer whole in each GPU, or shared out (train.parallel): {', '.join(ways)}")
    if config.train.gpu_memory:
        lines.append(
            f"a plan fills {100 * USABLE:.0f} % of {config.train.gpu_memory}, for gaps between the allocator's blocks"
        )
    return lines


def expectation_table(config: RunConfig, options: Options, plan: Plan, gpu: Gpu) -> Table:
    """How fast one GPU would be: mapet/planning/estimate.py."""
    size = replace(step_size(config, options.gpus), micro_batch=plan.micro_batch, recompute=plan.recompute)
    rows = expectation_rows(size, gpu, parse_count(options.images), config.optim.epochs)
    return _computed(f"one {gpu.name}, {config.train.precision}", rows)


def scaling_table(config: RunConfig, options: Options, link: float) -> Table:
    """What several GPUs would do: mapet/planning/estimate.py."""
    rows = scaling_rows(config, options.gpus, link, parse_count(options.images), options.images_per_second)
    each = f"{options.interconnect} per second each, global batch {config.optim.global_batch}"
    return _computed(f"{options.gpus} GPUs, {each}", rows)


def _computed(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table("computed, not measured", "", title=title, title_justify="left", show_edge=False)
    for row in rows:
        table.add_row(*row)
    return table
