"""Times of the attention kernels by device events, beside their peers, and of other launch configurations.

Ours comes first, and three repeats of all that need no compiling before anything slow is compiled; longer rounds follow
while there is time. A row is written after each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from bench import timing, tune
from bench.attention_pass import Pass, random_on
from bench.attention_ways import FLEX_SETTINGS, FlexSetting, Operands, flex, official, random_operands, sdpa_mask
from bench.attention_ways import Way as Peer
from bench.harvesting.common import (
    Way,
    attempt,
    attention_shape,
    calls,
    config_row,
    device_of,
    dtypes_of,
    shape_row,
    timed,
)  # fmt: skip
from bench.harvesting.part import Run
from bench.records import quantiles
from bench.timing import Clock
from bench.tune import OPS, Entry, Runner
from mapet_kernels import triton_launch
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.permuted_embed.op import permuted_patches_op
from mapet_kernels.registry import TwoStreamShape

LENGTHS = (197, 50, 344, 785, 1025)
FIRST_REPEATS, REPEATS = 3, 20
WAY_SECONDS = 1.5
"""That the samples of one way may take in one round."""
OFFICIAL_LENGTHS = (197, 50)
"""Its masks of every head fill the memory at longer ones."""
OTHERS = 5

CANDIDATES = {
    "attention_forward": (
        (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2),
    ),
    "attention_query_gradient": (
        (128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3), (128, 32, 8, 2), (64, 64, 4, 2),
    ),
    "attention_key_gradient": (
        (64, 128, 8, 3), (32, 64, 4, 3), (64, 64, 4, 3), (32, 128, 8, 3), (16, 64, 4, 3), (64, 64, 4, 2),
    ),
}  # fmt: skip
"""(rows, keys, warps, stages), the most promising first by python -m bench aot: fewest instructions, least traffic from
the L2 cache, or more programs on a processor, which no static figure weighs against each other."""


def lengths_of(run: Run, lengths: Sequence[int] = LENGTHS) -> Iterator[TwoStreamShape]:
    """Shapes of all lengths, in a dry run of the first, while there is time."""
    for tokens in lengths[: 1 if run.dry else None]:
        if run.left() > 0:
            yield attention_shape(run, tokens)


def entry_for(kernel: str, dtype: str, shape: TwoStreamShape, device: torch.device) -> Entry:
    """The launch table's entry for a device."""
    return Entry(kernel, dtype, shape.size, triton_launch.target(device))


def configs_for(run: Run, entry: Entry) -> list[LaunchConfig]:
    """Today's configuration, then OTHERS others, or with the argument `all` those that can work; in a dry run one."""
    others = [LaunchConfig(*numbers) for numbers in CANDIDATES[entry.kernel]]
    count = 1 if run.dry else OTHERS
    if run.arguments.get("all"):
        others = list(tune.candidates(entry))
        count = 1 if run.dry else len(others)
    today = entry.present()
    return [today, *[config for config in others if config_row(config) != config_row(today)][:count]]


def record_time(
    run: Run, op: str, way: str, seconds: Sequence[float], shape: TwoStreamShape, dtype: str, **more
) -> None:
    """A row "time"; a later one of the same op, way, configuration, shape and dtype replaces it, with more repeats."""
    more = {"config": None, "default": True} | more
    run.record("time", op=op, way=way, shape=shape_row(shape), dtype=dtype, **more, **quantiles(seconds))


def passes(peer: Peer, backward: bool = True) -> Way:
    """A peer's forward and backward pass, or the former alone."""

    def sample(clock: Clock) -> dict[str, float]:
        if not backward:
            leaves = [leaf.detach() for leaf in peer.leaves]
            return {"forward": clock.time(lambda: peer.attend(*leaves))[1]}
        outputs, forward = clock.time(peer.forward)
        return {"forward": forward, "backward": clock.time(partial(peer.backward, outputs))[1]}

    return sample


def ours(dtype: str, shape: TwoStreamShape, device: torch.device) -> Way:
    """The three kernels with today's configurations, and both of the backward pass one after the other."""
    by_op = {}
    for kernel, op in OPS.items():
        entry = entry_for(kernel, dtype, shape, device)
        by_op[op] = Runner(entry, shape, device).call(entry.present())
    dq, dkdv = by_op["dq"], by_op["dkdv"]
    return calls({**by_op, "backward": lambda: (dq(), dkdv())})


def ours_gathering(operands: Operands, dtype: torch.dtype, device: torch.device) -> Way:
    """Our forward kernel on content rows in image order, which it gathers."""
    tensors = Pass.make(operands.shape, dtype, random_on(device), perm=operands.permutation)
    forward = tensors.launches(triton_launch.target(device))[0]
    return calls({"forward": lambda: forward.run(device)})


def sdpa(operands: Operands) -> Peer:
    """torch's scaled_dot_product_attention over all pairs, unmasked: another task, for what its kernels reach."""
    q, d_out = (
        torch.cat(pair, dim=1).transpose(1, 2)
        for pair in ((operands.q_content, operands.q_query), (operands.d_content, operands.d_query))
    )
    leaves = tuple(x.detach().requires_grad_() for x in (q, operands.k.transpose(1, 2), operands.v.transpose(1, 2)))
    return Peer(leaves, lambda q, k, v: (F.scaled_dot_product_attention(q, k, v),), (d_out,), lambda *_: ())


def flex_setting(run: Run) -> FlexSetting:
    """Both streams in one call; uncompiled in a dry run. On a CPU it has no backward pass."""
    return FlexSetting(compiled=False) if run.dry else FLEX_SETTINGS["flex_one_call_128"]


def contest(run: Run) -> None:
    """Ours beside its peers at every length: a short round of all without the slow ones, then long ones with them."""
    for slow in (False, True):
        if slow:
            attempt(run, "permuted_embed", lambda: embedding(run))
        for shape in lengths_of(run):
            round_of(run, shape, slow=slow)


def round_of(run: Run, shape: TwoStreamShape, *, slow: bool) -> None:
    """One round at one length; a way that cannot be made or fails is told in a row."""
    device, ((name, dtype),) = device_of(run), dtypes_of(run, "bf16").items()
    operands = random_operands(shape, dtype, device)
    builders: dict[str, Callable[[], Way]] = {"ours": lambda: ours(name, shape, device)}
    if shape == attention_shape(run):
        builders["ours_gather"] = lambda: ours_gathering(operands, dtype, device)
    builders |= {"sdpa": lambda: passes(sdpa(operands)), "sdpa_mask": lambda: passes(sdpa_mask(operands))}
    if run.dry or shape.tokens in OFFICIAL_LENGTHS:
        builders["official"] = lambda: passes(official(operands, with_masks=False))
    if slow:  # it has to be compiled
        builders["flex"] = lambda: passes(flex(flex_setting(run), operands), backward=not run.dry)
    ways = {way: attempt(run, way, build, shape=str(shape)) for way, build in builders.items()}
    ways = {way: made for way, made in ways.items() if made is not None}
    repeats = 1 if run.dry else REPEATS if slow else FIRST_REPEATS
    configs = {op: config_row(entry_for(kernel, name, shape, device).present()) for kernel, op in OPS.items()}
    for way, by_op in timed(run, ways, repeats, 0.0 if run.dry else WAY_SECONDS, shape=str(shape)).items():
        for op, seconds in by_op.items():
            record_time(run, op, way, seconds, shape, name, config=configs.get(op) if way == "ours" else None)


def embedding(run: Run) -> None:
    """Bytes a second of the pass that permutes, normalises and casts patches: uint8 read, 16 bits written."""
    device, (dtype,) = device_of(run), dtypes_of(run, "bf16").values()
    batch, side, patch = (1, 8, 4) if run.dry else (512, 224, 16)
    images = torch.randint(0, 256, (batch, 3, side, side), device=device, dtype=torch.uint8)
    patches = torch.rand(batch, (side // patch) ** 2, device=device).argsort(dim=1)
    mean, std = (torch.tensor([0.5, 0.4, 0.3], device=device) for _ in range(2))
    clock, taken = timing.clock_for(device), []
    for _ in range(2 if run.dry else REPEATS):
        out, seconds = clock.time(lambda: permuted_patches_op(images, patches, patch, mean, std, dtype, "triton"))
        taken.append(seconds)
    figures = quantiles(taken[1:])
    moved = images.numel() + out.numel() * out.element_size()
    run.record("bandwidth", op="permuted_embed", bytes_per_s=moved / (figures["p50_ms"] / 1e3 or 1e-9), **figures)


Wanted = Callable[[Entry], Iterable[LaunchConfig]]
"""The configurations to time for an entry of the launch table."""


def configurations(run: Run) -> None:
    """Today's configuration and others of each kernel: the target first, then the other lengths, then more repeats."""
    compare_all(run, partial(configs_for, run), run.arguments.get("dtypes", ["bf16"]), (FIRST_REPEATS, REPEATS))


def tuned(run: Run) -> None:
    """The best configurations of the first call, and their neighbours, beside today's, at every length."""
    best = run.arguments["best"]

    def wanted(entry: Entry) -> list[LaunchConfig]:
        today, op = entry.present(), OPS[entry.kernel]
        found = LaunchConfig(**best[op]) if op in best else today
        return list(dict.fromkeys([today, found, *neighbours(found)]))[: 2 if run.dry else None]

    compare_all(run, wanted, ("bf16", "fp16"), (REPEATS,))


def compare_all(run: Run, wanted: Wanted, dtypes: Sequence[str], repeats: Sequence[int]) -> None:
    """Each kernel at every length, so many repeats at a time."""
    for count, dtype in product((1,) if run.dry else repeats, dtypes_of(run, *dtypes)):
        for shape, kernel in product(lengths_of(run), OPS):
            if run.left() > 0:
                compare(run, kernel, dtype, shape, wanted, count)


def neighbours(config: LaunchConfig) -> list[LaunchConfig]:
    """One step away in stages or warps."""
    stages = [replace(config, stages=stages) for stages in (config.stages - 1, config.stages + 1) if stages >= 1]
    return stages + [replace(config, warps=x) for x in (config.warps // 2, config.warps * 2) if 4 <= x <= 8]


def compare(run: Run, kernel: str, dtype: str, shape: TwoStreamShape, wanted: Wanted, repeats: int) -> None:
    """Time configurations of a kernel beside today's; one with other results is told, and not timed."""
    device, op = device_of(run), OPS[kernel]
    entry = entry_for(kernel, dtype, shape, device)
    runner, today = Runner(entry, shape, device), entry.present()
    ways: dict[Any, Way] = {}
    for config in dict.fromkeys([today, *wanted(entry)]):
        if run.left() <= 0:
            break
        if config == today or runner.agrees(config, today):
            ways[config] = calls({op: runner.call(config)})
        else:
            reason = f"{op}: other results than today's, or it does not run"
            run.record("failure", way=str(config_row(config)), shape=str(shape), reason=reason)
    for config, by_op in timed(run, ways, repeats, 0.0 if run.dry else WAY_SECONDS, shape=str(shape)).items():
        record_time(run, op, "ours", by_op[op], shape, dtype, config=config_row(config), default=config == today)


def warm(run: Run) -> None:
    """Compile every configuration of one kernel, so that it is in the cache when it is timed.

    Few images will do, but all lengths: the compiler looks at whether numbers are 1 or divisible by 16.
    """
    device, op = device_of(run), run.arguments["op"]
    kernel = next(kernel for kernel, name in OPS.items() if name == op)
    for shape in lengths_of(run):
        shape = replace(shape, batch=1)
        entry = entry_for(kernel, next(iter(dtypes_of(run, "bf16"))), shape, device)
        runner = Runner(entry, shape, device)
        for config in configs_for(run, entry):
            if run.left() <= 0:
                return
            attempt(run, f"warm {config_row(config)}", runner.call(config))
            run.record("warm", op=op, config=config_row(config))


def warm_flex(run: Run) -> None:
    """Compile FlexAttention's forward and backward pass for some lengths."""
    for shape in lengths_of(run, run.arguments["lengths"]):
        operands = random_operands(shape, next(iter(dtypes_of(run, "bf16").values())), device_of(run))
        passes(flex(flex_setting(run), operands), backward=not run.dry)(timing.CpuClock())
        run.record("warm", op="flex", config={"tokens": shape.tokens})
