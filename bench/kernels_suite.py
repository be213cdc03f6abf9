"""Every op of the registry, forward and backward, by every backend that runs here, beside its plain torch form.

Shapes follow the model: those that a step of the chosen sizes meets. Each backend is checked against plain torch in
float64, outputs and gradients, with the table of tolerances, on the first images or rows, as float64 has room for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import options
from bench.contest import Arena, Contest, Entrant, Timed, two_passes
from bench.guard import Unavailable
from bench.options import DTYPES
from bench.roofline import Cost, by_phase, costs
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
CHECKED = {
    "two_stream_attention": (8, ("q_content", "q_query", "k", "v")),
    "prefix_suffix_attention": (8, ("q", "k", "v")),
    "kmeans_assign": (1024, ("x",)),
}
"""How many images or rows the float64 check looks at, where not at all, and the inputs that have them first."""
BACKWARD = {"prefix_suffix_attention": (2.5, 2.0), "permuted_embed": (1.0, 1.0)}
"""FLOP and bytes of the backward pass to those of the forward pass; twice for an op that is not here. Attention: five
products to two, and Q, K, V, O, dO in, dQ, dK, dV out. Embedding: images need no gradient, so one product to one."""


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
    model, small = sizes.model, device.type == "cpu"
    n, mim_cut = model.tokens, options.scaled_cut(122, model.tokens)
    base = TwoStreamShape(n, sizes.cut, sizes.batch, model.heads, model.head_size)
    same = {"batch": sizes.batch, "heads": model.heads, "size": model.head_size}
    known: dict[str, dict[str, Any]] = {
        "two_stream_attention": {
            "block": base,
            "last_block": replace(base, with_content=False),
            "pim": replace(base, mask_tokens=False),
            "image_order": replace(base, image_order=True),
        },
        "prefix_suffix_attention": {
            "causal": PrefixSuffixShape(n, n, **same),
            "mim": PrefixSuffixShape(n, mim_cut, n - mim_cut, cut=mim_cut, shift="bidirectional", **same),
        },
        "permuted_embed": {
            "step": PermutedEmbedShape(model.image_size, model.patch_size, model.width, sizes.cut, sizes.batch)
        },
        "kmeans_assign": {"fit": KMeansShape(1024, 256, 64) if small else KMeansShape(16384, 1024, 64)},
        "kmeans_update": {"fit": KMeansShape(8192, 256, 64) if small else KMeansShape(262144, 8192, 512)},
    }
    costliest = max(spec.shapes, key=lambda name: spec.cost(spec.shapes[name], torch.float32)[0])
    return known.get(spec.name, {costliest: spec.shapes[costliest]})


def contest(spec: OpSpec, label: str, shape: Any, dtype: str, device: torch.device) -> Contest:
    """An op's backends against plain torch; `shape` is the op's own. The base is the backend that `auto` takes."""
    backends = tuple(dict.fromkeys((*spec.backends, *spec.gpu_backends)))
    if set(ATTENTION_BACKENDS) <= set(backends):
        base = choose_backend("auto", device, DTYPES[dtype], backends)
    else:
        base = choose_listed_backend("auto", backends, device, DTYPES[dtype])
    said = " ".join(f"{value}" for value in asdict(shape).values() if not isinstance(value, bool | str))
    sizes = {"op": spec.name, "label": label, "shape": asdict(shape)}
    return Contest(
        "kernels", f"{spec.name} {label} {dtype} ({said})", sizes, tuple(op_costs(spec, shape, DTYPES[dtype])),
        (*backends, PLAIN), base, dtype, partial(arena, spec, shape, DTYPES[dtype], device),
    )  # fmt: skip


@contextmanager
def arena(spec: OpSpec, shape: Any, dtype: torch.dtype, device: torch.device) -> Iterator[Arena]:
    """One case for all backends, random gradients of its outputs, and the float64 yardstick."""
    case = spec.make_case(shape, dtype, str(device))
    call = OpCall(spec, case, PLAIN)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(o.shape, generator=generator).to(o.device, o.dtype)
        for o in call.outputs(call.leaves())
        if o.requires_grad
    ]
    call = replace(call, upstream=upstream)
    rows, _ = CHECKED.get(spec.name, (None, ()))
    plain = replace(call, case=sliced(spec, case), upstream=[u[:rows] for u in upstream])
    wide = {name: x.double() for name, x in plain.case.inputs.items()}
    exact = replace(plain, case=replace(plain.case, inputs=wide), upstream=[u.double() for u in plain.upstream])
    names = dict.fromkeys((PLAIN, *spec.backends, *spec.gpu_backends))
    ways = {name: partial(entrant, replace(call, backend=name), device, dtype) for name in names}
    yield Arena(ways, partial(errors, exact.results(), plain.results(), rows), op_costs(spec, shape, dtype))


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

    def outputs(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        """What the op makes of the leaves, outputs that are None left out."""
        call = self.spec.plain if self.backend == PLAIN else partial(self.spec.function, backend=self.backend)
        made = call(**leaves, **self.case.options)
        return [part for part in (made if isinstance(made, tuple) else (made,)) if part is not None]

    def gradients(self, leaves: dict[str, Tensor], outputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Of the leaves."""
        wanted = [x for x in leaves.values() if x.requires_grad]
        return torch.autograd.grad([o for o in outputs if o.requires_grad], wanted, self.upstream) if wanted else ()

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients."""
        leaves = self.leaves()
        outputs = self.outputs(leaves)
        return [o.detach() for o in outputs], list(self.gradients(leaves, outputs))


def entrant(call: OpCall, device: torch.device, dtype: torch.dtype) -> Entrant:
    """A backend that is ready; Unavailable where it does not run here."""
    if (reason := reason_against(call, device, dtype)) is not None:
        raise Unavailable(reason)
    leaves = call.leaves()
    forward = partial(call.outputs, leaves)
    phases = two_passes(forward, partial(call.gradients, leaves))
    return Entrant(phases if call.spec.differentiable else {"forward": Timed(forward)}, call.results, call.results)


def reason_against(call: OpCall, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the call's backend does not run here, or None."""
    if call.backend == PLAIN:
        return None
    if set(ATTENTION_BACKENDS) <= set(call.spec.backends):
        return available_backends(device, dtype).get(call.backend)
    return reason_against_listed(call.backend, device, dtype)


def sliced(spec: OpSpec, case: Case) -> Case:
    """The part of the case that the check looks at."""
    rows, names = CHECKED.get(spec.name, (None, ()))
    inputs = {name: x[:rows] if name in names else x for name, x in case.inputs.items()}
    changes = {"perm": case.options["perm"][:rows]} if "perm" in case.options else {}
    return Case(inputs, case.options | changes, case.fixed)


def errors(exact, plain, rows: int | None, results) -> dict[str, float]:
    """Used part of each output's and gradient's budget; of integers, such as ids, 0 where all are equal."""
    shares = {}
    for part, factor, place in (("output", FORWARD_FACTOR, 0), ("gradient", GRADIENT_FACTOR, 1)):
        for i, (e, p, actual) in enumerate(zip(exact[place], plain[place], results[place], strict=True)):
            if actual.dtype.is_floating_point:
                shares[f"{part}_{i}"] = used_budget(actual[:rows], p.to(actual.dtype), e, factor)
            else:
                shares[f"{part}_{i}"] = 0.0 if torch.equal(actual[:rows], e) else float("inf")
    return shares


def op_costs(spec: OpSpec, shape: Any, dtype: torch.dtype) -> dict[str, Cost]:
    """Cost of each pass, from the registry."""
    if isinstance(shape, TwoStreamShape) and isinstance(shape.cuts, int):
        return costs(shape, dtype)
    flop, moved = spec.cost(shape, dtype)
    if not spec.differentiable:
        return {"forward": Cost(flop, moved)}
    more_flop, more_bytes = BACKWARD.get(spec.name, (2.0, 2.0))
    return by_phase(Cost(flop, moved), Cost(more_flop * flop, int(more_bytes * moved)))
