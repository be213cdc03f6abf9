"""Every op of the registry, forward and backward, by every backend that runs here, beside its plain torch form.

Shapes follow the model: those that a step of the chosen sizes meets. Each backend is checked against plain torch in
float64, outputs and gradients, with the table of tolerances, on as many images or rows as float64 has room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import options
from bench.contest import Arena, Contest, Entrant
from bench.guard import Unavailable
from bench.options import DTYPES
from bench.roofline import Cost, costs
from bench.timing import Clock, sample
from mapet_kernels.backends import (
    ATTENTION_BACKENDS,
    available_backends,
    choose_backend,
    choose_listed_backend,
    reason_against_listed,
)
from mapet_kernels.registry import (
    REGISTRY,
    Case,
    KMeansShape,
    OpSpec,
    PermutedEmbedShape,
    PrefixSuffixShape,
    TwoStreamShape,
)
from mapet_kernels.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, used_budget

PLAIN = "plain_torch"
SLICED = {
    "two_stream_attention": ("q_content", "q_query", "k", "v"),
    "prefix_suffix_attention": ("q", "k", "v"),
    "kmeans_assign": ("x",),
}
"""Inputs whose first dimension is the results' own, so that the check may look at a part."""
BACKWARD = {"prefix_suffix_attention": (2.5, 2.0), "permuted_embed": (1.0, 1.0)}
"""FLOP and bytes of the backward pass to those of the forward pass. Attention: five products to two, and Q, K, V, O, dO
in, dQ, dK, dV out. Embedding: images need no gradient, so one product to one. Two-stream attention has its own rule."""
CHECK_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
"""What the intermediate results of the float64 check may take."""


def contests(chosen: options.Options, device: torch.device) -> list[Contest]:
    """One for each op, shape and dtype."""
    found = {}
    for sizes in options.combinations(chosen, device):
        for spec in REGISTRY.values():
            for label, shape in sized_shapes(spec, sizes, device).items():
                made = contest(spec, label, shape, sizes.dtype, device)
                found[made.name] = made
    return list(found.values())


def sized_shapes(spec: OpSpec, sizes: options.Sizes, device: torch.device) -> dict[str, Any]:
    """Shapes of an op that a step or a fit of these sizes meets; of an op unknown here, its costliest test shape."""
    model, batch = sizes.model, sizes.batch
    heads, size = model.heads, model.head_size
    small = device.type == "cpu"
    mim_cut = options.scaled_cut(122, model.tokens)
    if spec.name == "two_stream_attention":
        base = TwoStreamShape(model.tokens, sizes.cut, batch, heads, size)
        return {
            "block": base,
            "last_block": replace(base, with_content=False),
            "pim": replace(base, mask_tokens=False),
            "image_order": replace(base, image_order=True),
        }
    if spec.name == "prefix_suffix_attention":
        n = model.tokens
        same = {"batch": batch, "heads": heads, "size": size}
        return {
            "causal": PrefixSuffixShape(n, n, **same),
            "mim": PrefixSuffixShape(n, mim_cut, n - mim_cut, cut=mim_cut, shift="bidirectional", **same),
        }
    if spec.name == "permuted_embed":
        return {"step": PermutedEmbedShape(model.image_size, model.patch_size, model.width, sizes.cut, batch)}
    if spec.name == "kmeans_assign":
        return {"fit": KMeansShape(1024, 256, 64) if small else KMeansShape(16384, 1024, 64)}
    if spec.name == "kmeans_update":
        return {"fit": KMeansShape(8192, 256, 64) if small else KMeansShape(262144, 8192, 512)}
    costliest = max(spec.shapes, key=lambda name: spec.cost(spec.shapes[name], torch.float32)[0])
    return {costliest: spec.shapes[costliest]}


def contest(spec: OpSpec, label: str, shape: Any, dtype: str, device: torch.device) -> Contest:
    """An op's backends against plain torch; `shape` is the op's own."""
    backends = tuple(dict.fromkeys((*spec.backends, *spec.gpu_backends)))
    base = own_choice(backends, device, DTYPES[dtype])
    phases = ("forward", "backward", "both") if spec.differentiable else ("forward",)
    said = " ".join(f"{value}" for key, value in asdict(shape).items() if not isinstance(value, bool | str))
    sizes = {"op": spec.name, "label": label, "shape": {key: value for key, value in asdict(shape).items()}}
    return Contest(
        "kernels", f"{spec.name} {label} {dtype} ({said})", sizes, phases, (*backends, PLAIN), base, dtype,
        partial(arena, spec, shape, DTYPES[dtype], device),
    )  # fmt: skip


def own_choice(backends: Sequence[str], device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `auto` takes, whose time the others' is divided by."""
    if set(ATTENTION_BACKENDS) <= set(backends):
        return choose_backend("auto", device, dtype, backends)
    return choose_listed_backend("auto", backends, device, dtype)


@contextmanager
def arena(spec: OpSpec, shape: Any, dtype: torch.dtype, device: torch.device) -> Iterator[Arena]:
    """One case for all backends, random gradients of its outputs, and the float64 yardstick."""
    case = spec.make_case(shape, dtype, str(device))
    call = OpCall(spec, case, PLAIN)
    outputs = call.forward()
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs if o.requires_grad]
    call = replace(call, upstream=upstream)
    rows = checked_rows(spec, shape, case, device)
    exact = replace(call, case=widened(sliced(spec, case, rows)), upstream=[u[:rows].double() for u in upstream])
    plain = replace(call, case=sliced(spec, case, rows), upstream=[u[:rows] for u in upstream])
    judge = partial(errors, exact.results(), plain.results(), rows)
    names = dict.fromkeys((PLAIN, *spec.backends, *spec.gpu_backends))
    yield Arena({name: partial(entrant, replace(call, backend=name), device, dtype) for name in names}, judge, {
        phase: cost for phase, cost in op_costs(spec, shape, dtype).items() if spec.differentiable or phase == "forward"
    })  # fmt: skip


@dataclass(frozen=True)
class OpCall:
    """An op on a case by one backend, or in plain torch; upstream: gradients of those outputs that have any."""

    spec: OpSpec
    case: Case
    backend: str
    upstream: list[Tensor] | None = None

    def leaves(self) -> dict[str, Tensor]:
        """The floating-point inputs by name, those that get gradients as leaves."""
        fixed = self.case.fixed
        return {
            name: x if name in fixed or not self.spec.differentiable else x.detach().requires_grad_()
            for name, x in self.case.inputs.items()
        }

    def forward(self) -> list[Tensor]:
        """The outputs, those that are None left out."""
        return self._outputs(self.leaves())

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients of the inputs."""
        leaves = self.leaves()
        outputs = self._outputs(leaves)
        return [o.detach() for o in outputs], list(self._gradients(outputs, leaves))

    def passes(self) -> Passes:
        """What is timed."""
        return Passes(self, self.leaves())

    def _outputs(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        spec = self.spec
        if self.backend == PLAIN:
            made = spec.plain(**leaves, **self.case.options)
        else:
            made = spec.function(**leaves, **self.case.options, backend=self.backend)
        return [part for part in (made if isinstance(made, tuple) else (made,)) if part is not None]

    def _gradients(self, outputs: list[Tensor], leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        wanted = [x for x in leaves.values() if x.requires_grad]
        if not wanted:
            return ()
        return torch.autograd.grad([o for o in outputs if o.requires_grad], wanted, self.upstream)


@dataclass(frozen=True)
class Passes:
    """The two passes of an op for bench.timing.sample."""

    call: OpCall
    leaves: dict[str, Tensor]

    def forward(self) -> list[Tensor]:
        return self.call._outputs(self.leaves)

    def backward(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return self.call._gradients(outputs, self.leaves)

    def sample(self, clock: Clock) -> dict[str, float]:
        """Seconds of each pass; of an op without gradients, of its one pass."""
        if self.call.spec.differentiable:
            return sample(self, clock)
        return {"forward": clock.time(self.forward)[1]}


def entrant(call: OpCall, device: torch.device, dtype: torch.dtype) -> Entrant:
    """A backend that is ready; Unavailable where it does not run here."""
    if (reason := reason_against(call, device, dtype)) is not None:
        raise Unavailable(reason)
    passes = call.passes()
    return Entrant(passes.sample, call.results, call.results)


def reason_against(call: OpCall, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the call's backend does not run here, or None."""
    if call.backend == PLAIN:
        return None
    if set(ATTENTION_BACKENDS) <= set(call.spec.backends):
        return available_backends(device, dtype).get(call.backend)
    return reason_against_listed(call.backend, device, dtype)


def checked_rows(spec: OpSpec, shape: Any, case: Case, device: torch.device) -> int | None:
    """How many images or rows the float64 check looks at, or None for all."""
    if spec.name not in SLICED:
        return None
    if isinstance(shape, KMeansShape):
        each = 2 * 8 * shape.clusters * shape.features
    else:
        queries = sum(x.shape[1] for name, x in case.inputs.items() if name.startswith("q"))
        each = 6 * 8 * queries * case.inputs["k"].shape[1] * shape.heads  # autograd holds about six copies of scores
    first = next(x.shape[0] for name, x in case.inputs.items() if name in SLICED[spec.name])
    return min(first, max(1, CHECK_BYTES[device.type] // each))


def sliced(spec: OpSpec, case: Case, rows: int | None) -> Case:
    """The case of the first `rows` images or rows."""
    if rows is None:
        return case
    inputs = {name: x[:rows] if name in SLICED[spec.name] else x for name, x in case.inputs.items()}
    changes = {"perm": case.options["perm"][:rows]} if "perm" in case.options else {}
    return Case(inputs, case.options | changes, case.fixed)


def widened(case: Case) -> Case:
    """The case in float64."""
    return Case({name: x.double() for name, x in case.inputs.items()}, case.options, case.fixed)


def errors(exact, plain, rows: int | None, results) -> dict[str, float]:
    """Used part of each output's and gradient's budget; of integers, such as ids, 0 where all are equal."""
    shares = {}
    for part, factor, place in (("output", FORWARD_FACTOR, 0), ("gradient", GRADIENT_FACTOR, 1)):
        for i, (e, p, actual) in enumerate(zip(exact[place], plain[place], results[place], strict=True)):
            actual = actual[:rows] if rows is not None else actual
            if actual.dtype.is_floating_point:
                p = p if p.dtype == actual.dtype else p.to(actual.dtype)
                shares[f"{part}_{i}"] = used_budget(actual, p, e, factor)
            else:
                shares[f"{part}_{i}"] = 0.0 if torch.equal(actual, e) else float("inf")
    return shares


def op_costs(spec: OpSpec, shape: Any, dtype: torch.dtype) -> dict[str, Cost]:
    """Cost of each pass from the registry; the backward pass of an op not in BACKWARD as twice the forward pass."""
    if isinstance(shape, TwoStreamShape) and isinstance(shape.cuts, int):
        return costs(shape, dtype)
    flop, moved = spec.cost(shape, dtype)
    more_flop, more_bytes = BACKWARD.get(spec.name, (2.0, 2.0))
    backward = Cost(more_flop * flop, int(more_bytes * moved))
    return {
        "forward": Cost(flop, moved),
        "backward": backward,
        "both": Cost(flop + backward.flop, moved + backward.bytes),
    }
