"""Times of the attention kernels by device events, beside their peers, and of other launch configurations.

Ours comes first, and three repeats of all that need no compiling before anything slow is compiled; longer rounds follow
while there is time. A row is written after each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing, tune
from bench.attention_ways import (
    FLEX_SETTINGS,
    FlexSetting,
    Operands,
    Way,
    flex,
    heads_first,
    official,
    random_operands,
    sdpa_mask,
)  # fmt: skip
from bench.harvesting.common import attention_shape, config_row, device_of, dtypes_of, guarded, record_time
from bench.harvesting.part import Run
from bench.records import quantiles
from bench.timing import Clock
from mapet_kernels import triton_launch
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.permuted_embed.op import permuted_patches_op
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.two_stream_attention import triton_backend
from mapet_kernels.two_stream_attention.problem import Problem, Streams

OPS = {"attention_forward": "forward", "attention_query_gradient": "dq", "attention_key_gradient": "dkdv"}
"""Function of the launch table -> op, as rows tell it."""
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


def entry_for(kernel: str, dtype: str, shape: TwoStreamShape, device: torch.device) -> tune.Entry:
    """The launch table's entry for a device."""
    return tune.Entry(kernel, dtype, shape.size, triton_launch.target(device))


def configs_for(entry: tune.Entry) -> list[LaunchConfig]:
    """Today's configuration, then OTHERS others."""
    others = [LaunchConfig(*numbers) for numbers in CANDIDATES[entry.kernel]]
    today = entry.present()
    return [today, *[config for config in others if config_row(config) != config_row(today)][:OTHERS]]


@dataclass(frozen=True)
class Calls:
    """A way as calls by op, each timed alone."""

    calls: Mapping[str, Callable[[], Any]]

    def sample(self, clock: Clock) -> dict[str, float]:
        """Seconds by op."""
        return {op: clock.time(call)[1] for op, call in self.calls.items()}


@dataclass(frozen=True)
class Passes:
    """A peer's forward and backward pass, or the former alone."""

    way: Way
    backward: bool = True

    def sample(self, clock: Clock) -> dict[str, float]:
        """Seconds by op."""
        if not self.backward:
            leaves = [leaf.detach() for leaf in self.way.leaves]
            return {"forward": clock.time(lambda: self.way.attend(*leaves))[1]}
        outputs, forward = clock.time(self.way.forward)
        return {"forward": forward, "backward": clock.time(partial(self.way.backward, outputs))[1]}


def our_kernels(dtype: str, shape: TwoStreamShape, device: torch.device) -> Calls:
    """The three kernels with today's configurations, and both of the backward pass one after the other."""
    calls = {}
    for kernel, op in OPS.items():
        entry = entry_for(kernel, dtype, shape, device)
        calls[op] = tune.Runner(entry, shape, device).call(entry.present())
    dq, dkdv = calls["dq"], calls["dkdv"]
    return Calls({**calls, "backward": lambda: (dq(), dkdv())})


def sdpa(operands: Operands) -> Way:
    """torch's scaled_dot_product_attention over all pairs, unmasked: another task, for what its kernels reach."""

    def arrange(q_content: Tensor, q_query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return heads_first(torch.cat([q_content, q_query], dim=1), k, v)

    def restore(out: Tensor) -> tuple[Tensor, ...]:
        return heads_first(out)[0].split([operands.content_rows, operands.shape.targets], dim=1)

    return Way(operands, arrange, lambda q, k, v: (F.scaled_dot_product_attention(q, k, v),), restore)


def ours_gathering(operands: Operands) -> Calls:
    """Our forward kernel on content rows in image order, which it gathers."""
    shape = operands.shape
    problem = Problem(shape.tokens, shape.targets, shape.cuts, True, shape.size**-0.5)
    q = Streams(operands.q_content, operands.q_query)
    k, v = torch.stack([operands.k, operands.v], dim=2).unbind(2)
    out = q.empty_like()
    lse = Streams(*(x.new_empty(x.shape[:3], dtype=torch.float32) for x in (out.content, out.query)))
    perm = operands.permutation
    return Calls({"forward": lambda: triton_backend.forward(q, k, v, out, lse, problem, perm)})


def embedding(run: Run) -> None:
    """Bytes a second of the pass that permutes, normalises and casts patches: uint8 read, 16 bits written."""
    device, (dtype,) = device_of(run), dtypes_of(run, "bf16").values()
    batch, side, patch = (1, 8, 4) if run.dry else (512, 224, 16)
    images = torch.randint(0, 256, (batch, 3, side, side), device=device, dtype=torch.uint8)
    patches = torch.rand(batch, (side // patch) ** 2, device=device).argsort(dim=1)
    mean, std = (torch.tensor([0.5, 0.4, 0.3], device=device) for _ in range(2))
    clock = timing.clock_for(device)
    taken = []
    for _ in range(2 if run.dry else REPEATS):
        out, seconds = clock.time(lambda: permuted_patches_op(images, patches, patch, mean, std, dtype, "triton"))
        taken.append(seconds)
    figures = quantiles(taken[1:])
    moved = images.numel() + out.numel() * out.element_size()
    run.record("bandwidth", op="permuted_embed", bytes_per_s=moved / (figures["p50_ms"] / 1e3 or 1e-9), **figures)


def flex_setting(run: Run) -> FlexSetting:
    """Both streams in one call; uncompiled in a dry run. On a CPU it has no backward pass."""
    return FlexSetting(compiled=False) if run.dry else FLEX_SETTINGS["flex_one_call_128"]


def peers(run: Run, operands: Operands, *, slow: bool) -> dict[str, Callable[[], Way]]:
    """Builders by name; `slow` are those that have to be compiled."""
    if slow:
        return {"flex": lambda: flex(flex_setting(run), operands)}
    made: dict[str, Callable[[], Way]] = {"sdpa": lambda: sdpa(operands), "sdpa_mask": lambda: sdpa_mask(operands)}
    if run.dry or operands.shape.tokens in OFFICIAL_LENGTHS:
        made["official"] = lambda: official(operands, with_masks=False)
    return made


def contest(run: Run) -> None:
    """Ours beside its peers at every length: a short round of all without the slow ones, then long ones with them."""
    device = device_of(run)
    clock = timing.clock_for(device)
    ((dtype, _),) = dtypes_of(run, "bf16").items()
    for slow in (False, True):
        if slow:
            _, failure = guarded(lambda: embedding(run))
            if failure is not None:
                run.record("failure", way="permuted_embed", reason=failure.reason)
        for tokens in LENGTHS[:1] if run.dry else LENGTHS:
            if run.left() > 0:
                round_of(run, attention_shape(run, tokens), dtype, clock, device, slow=slow)


def round_of(run: Run, shape: TwoStreamShape, dtype: str, clock: Clock, device: torch.device, *, slow: bool) -> None:
    """One round at one length; a way that cannot be made or fails is told in a row."""
    operands = random_operands(shape, dtypes_of(run, dtype)[dtype], device)
    builders: dict[str, Callable[[], Any]] = {"ours": lambda: our_kernels(dtype, shape, device)}
    if shape == attention_shape(run):
        builders["ours_gather"] = lambda: ours_gathering(operands)
    for is_slow in (False, True) if slow else (False,):
        for name, build in peers(run, operands, slow=is_slow).items():
            builders[name] = lambda build=build, name=name: Passes(build(), not (run.dry and name == "flex"))
    ways = {}
    for name, build in builders.items():
        ways[name], failure = guarded(build)
        if failure is not None:
            run.record("failure", way=name, shape=str(shape), reason=failure.reason)
            del ways[name]
    repeats = 1 if run.dry else REPEATS if slow else FIRST_REPEATS
    found = timed(run, ways, clock, repeats, shape)
    for name, by_op in found.items():
        for op, seconds in by_op.items():
            config = our_config(op, dtype, shape, device) if name == "ours" else None
            record_time(run, op, name, seconds, shape, dtype, config)


def our_config(op: str, dtype: str, shape: TwoStreamShape, device: torch.device) -> dict[str, int] | None:
    """Today's of an op that is one kernel."""
    return next(
        (config_row(entry_for(kernel, dtype, shape, device).present()) for kernel, name in OPS.items() if name == op),
        None,
    )


def timed(
    run: Run, ways: Mapping[Any, Any], clock: Clock, repeats: int, shape: TwoStreamShape
) -> dict[Any, dict[str, list[float]]]:
    """Samples by way and op, interleaved; a way that fails is told in a row."""
    budget = 0.0 if run.dry else WAY_SECONDS
    seconds, reasons = timing.interleaved(
        ways, clock, repeats=repeats, budget=budget, deadline=timing.Deadline(run.left()), guard=guarded,
        sample=lambda way, clock: way.sample(clock),
    )  # fmt: skip
    for way, failure in reasons.items():
        run.record("failure", way=str(way), shape=str(shape), reason=failure.reason)
    return seconds


def configurations(run: Run) -> None:
    """Today's configuration and others of each kernel: the target first, then the other lengths, then more repeats."""
    wanted = (lambda entry: configs_for(entry)[:2]) if run.dry else configs_for
    for repeats in (1,) if run.dry else (FIRST_REPEATS, REPEATS):
        for tokens in LENGTHS[:1] if run.dry else LENGTHS:
            compare(run, attention_shape(run, tokens), wanted, repeats)


def tuned(run: Run) -> None:
    """The best configurations of the first call, and their neighbours, beside today's, at every length."""
    best = {
        kernel: LaunchConfig(**run.arguments["best"][op]) for kernel, op in OPS.items() if op in run.arguments["best"]
    }

    def wanted(entry: tune.Entry) -> list[LaunchConfig]:
        found = best.get(entry.kernel, entry.present())
        return list(dict.fromkeys([entry.present(), found, *neighbours(found)]))[: 2 if run.dry else None]

    for dtype in dtypes_of(run, "bf16", "fp16"):
        for tokens in LENGTHS[:1] if run.dry else LENGTHS:
            compare(run, attention_shape(run, tokens), wanted, 1 if run.dry else REPEATS, dtype)


def neighbours(config: LaunchConfig) -> Iterable[LaunchConfig]:
    """One step away in stages or warps."""
    for stages in (config.stages - 1, config.stages + 1):
        if stages >= 1:
            yield LaunchConfig(config.rows, config.keys, config.warps, stages)
    for warps in (config.warps // 2, config.warps * 2):
        if 4 <= warps <= 8:
            yield LaunchConfig(config.rows, config.keys, warps, config.stages)


def compare(
    run: Run, shape: TwoStreamShape, wanted: Callable[[tune.Entry], list[LaunchConfig]], repeats: int, dtype: str = ""
) -> None:
    """Configurations of each kernel at one shape. One that gives other results than today's is told, and not timed."""
    device = device_of(run)
    clock = timing.clock_for(device)
    dtype = dtype or next(iter(dtypes_of(run, "bf16")))
    for kernel, op in OPS.items():
        if run.left() <= 0:
            return
        entry = entry_for(kernel, dtype, shape, device)
        runner, today = tune.Runner(entry, shape, device), entry.present()
        ways = {}
        for config in wanted(entry):
            if run.left() <= 0:
                break
            if config == today or runner.agrees(config, today):
                ways[config] = Calls({op: runner.call(config)})
            else:
                run.record(
                    "failure",
                    way=str(config_row(config)),
                    shape=str(shape),
                    reason=f"{op}: other results than today's, or it does not run",
                )
        for config, by_op in timed(run, ways, clock, repeats, shape).items():
            record_time(run, op, "ours", by_op[op], shape, dtype, config_row(config), default=config == today)


def warm(run: Run) -> None:
    """Compile every configuration of one kernel, so that it is in the cache when it is timed.

    Few images will do, but all lengths: the compiler looks at whether numbers are 1 or divisible by 16.
    """
    device = device_of(run)
    kernel = next(kernel for kernel, op in OPS.items() if op == run.arguments["op"])
    for dtype in dtypes_of(run, "bf16"):
        for tokens in LENGTHS[:1] if run.dry else LENGTHS:
            shape = replace(attention_shape(run, tokens), batch=1)
            entry = entry_for(kernel, dtype, shape, device)
            runner = tune.Runner(entry, shape, device)
            for config in configs_for(entry)[: 2 if run.dry else None]:
                if run.left() <= 0:
                    return
                _, failure = guarded(runner.call(config))
                run.record("warm", op=run.arguments["op"], config=config_row(config), reason=failure and failure.reason)


def warm_flex(run: Run) -> None:
    """Compile FlexAttention's forward and backward pass for some lengths."""
    device = device_of(run)
    for tokens in run.arguments["lengths"][: 1 if run.dry else None]:
        shape = attention_shape(run, tokens)
        operands = random_operands(shape, next(iter(dtypes_of(run, "bf16").values())), device)
        way = Passes(flex(flex_setting(run), operands), backward=not run.dry)
        way.sample(timing.CpuClock())
        run.record("warm", op="flex", config={"tokens": tokens}, reason=None)
