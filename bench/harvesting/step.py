"""The optimizer step: eager, compiled, with CUDA graphs, stochastic depth skipped or not, beside the official way; and
its peak memory beside the plan's.

Several steps are timed as one, as in training the host runs ahead of the device.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench import tune
from bench.harvesting.common import Way, attempt, device_of, timed
from bench.harvesting.part import Run, Skipped
from bench.records import quantiles
from bench.timing import Clock
from mapet_kernels.launch import LaunchConfig

try:
    from bench.options import Sizes, scaled_cut
    from bench.step import OfficialStep, Setting, resident
    from mapet.config import ModelConfig, RunConfig, SpeedConfig
    from mapet.distributed import World
    from mapet.errors import OutOfMemory
    from mapet.planning.memory import predict_memory, step_size
    from mapet.training.learner import Learner
except ModuleNotFoundError as error:  # the model needs packages that a machine with torch alone may lack
    MISSING: str | None = error.name
else:
    MISSING = None

CUTS = {"base": 60, "small": 50, "tiny": 50}
"""Of the paper's settings."""
STEPS = 4
"""Of ours, timed as one; the official way's are so long that the host is ahead anyway."""
FIRST_REPEATS, REPEATS = 3, 12
MODES: dict[str, dict[str, bool]] = {
    "eager": {"skip_dropped": False},
    "eager_skip_dropped": {"skip_dropped": True},
    "compiled": {"compile": True},
    "graphs": {"cuda_graphs": True, "skip_dropped": False},
    "compiled_graphs": {"compile": True, "cuda_graphs": True},
}
"""Switches of section speed, by mode."""
PROFILED, TABLE_ROWS = 3, 40
CAP_GIB = 16
MEMORY_CASES = ((96, "none"), (128, "cheap"), (512, "blocks"))
"""(images, what is recomputed) of ViT-B under the cap."""


@dataclass(frozen=True)
class Stepper:
    """A way to take steps. held: tensors that it keeps between them. together: steps that are timed as one."""

    step: Callable[[], object]
    held: Callable[[], list[torch.Tensor]]
    together: int = STEPS

    def sample(self, clock: Clock) -> dict[str, float]:
        """Seconds of a step, of several in one go."""

        def several() -> None:
            for _ in range(self.together):
                self.step()

        return {"step": clock.time(several)[1] / self.together}

    def bytes(self) -> int:
        """Of what it holds."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.held())


def setting_for(run: Run) -> Setting:
    """The step that the part is about, under its cap.

    Raises:
        Skipped: the model cannot be imported here.
    """
    if MISSING is not None:
        raise Skipped(f"the step needs the package {MISSING}, which is not installed")
    device, name = device_of(run), run.arguments["model"]
    if (cap := run.arguments.get("cap_gib")) and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (cap << 30) / total), device)
    model, batch, dtype = ModelConfig.preset(name), run.arguments["batch"], run.arguments.get("dtype", "bf16")
    if run.dry:
        model, batch, dtype = replace(model, image_size=32, depth=2, width=32, heads=2, vocabulary=16), 2, "fp32"
    sizes = Sizes(model, name, batch, dtype, scaled_cut(CUTS[name], model.tokens))
    return Setting(sizes, device, backend=run.arguments.get("backend", "auto"))


def learning(setting: Setting, config: RunConfig) -> Stepper:
    """A learner as pre-training makes it."""
    learner, numbers = Learner(config, World(setting.device), setting.plan), itertools.count()
    return Stepper(
        lambda: learner.step(next(numbers), setting.batch, with_accuracy=False),
        lambda: resident(learner.objective, learner.optimizer),
    )


def ours(setting: Setting, mode: str) -> Stepper:
    """With the switches of a mode."""
    return learning(setting, replace(setting.config, speed=replace(SpeedConfig(), **MODES[mode])))


def official(setting: Setting) -> Stepper:
    """The official way on one step's masks, which lie on the device: building them takes seconds of a CPU."""
    peer = OfficialStep(setting)
    masks = [mask.to(setting.device) for mask in peer.masks(0)]
    return Stepper(lambda: peer.step(0, masks), lambda: resident(peer.objective, peer.optimizer), together=1)


def measure(run: Run) -> None:
    """All modes but the compiled ones and the official way, a few repeats of each; then the compiled ones, and more."""
    setting, modes, compiled = setting_for(run), ["eager", "eager_skip_dropped"], ["compiled"]
    with dry_compile(run), tuned_table(run.arguments.get("best", {})):
        if run.arguments.get("graphs") and setting.device.type == "cuda":
            modes, compiled = [*modes, "graphs"], [*compiled, "compiled_graphs"]
        elif run.arguments.get("graphs"):
            run.record("failure", way="graphs", reason="CUDA graphs need a GPU")
        builders = {mode: partial(ours, setting, mode) for mode in modes} | {"official": partial(official, setting)}
        steppers: dict[str, Stepper] = {}
        add(run, steppers, builders)
        rounds(run, setting, steppers, 1 if run.dry else FIRST_REPEATS)
        if run.arguments.get("profile") and "eager" in steppers:
            attempt(run, "profile", lambda: profile(run, steppers["eager"]))
        add(run, steppers, {mode: partial(ours, setting, mode) for mode in compiled})
        rounds(run, setting, steppers, 1 if run.dry else REPEATS)


def add(run: Run, steppers: dict[str, Stepper], builders: Mapping[str, Callable[[], Stepper]]) -> None:
    """Make ways and take a first step; one that fails is told in a row."""
    for name, build in builders.items():
        if run.left() > 0 and (stepper := attempt(run, name, partial(started, build))) is not None:
            steppers[name] = stepper


def started(build: Callable[[], Stepper]) -> Stepper:
    """A way that has taken a step."""
    stepper = build()
    stepper.step()
    return stepper


def rounds(run: Run, setting: Setting, steppers: Mapping[str, Stepper], repeats: int) -> None:
    """Time the ways in turn, and record each with the peak memory of a step."""
    ways: dict[str, Way] = {name: stepper.sample for name, stepper in steppers.items()}
    for name, taken in timed(run, ways, repeats, 0.3 * max(run.left(), 0.0)).items():
        figures, sizes = quantiles(taken["step"]), setting.sizes
        others = sum(stepper.bytes() for other, stepper in steppers.items() if other != name)
        run.record(
            "step", model=sizes.model_name, batch=sizes.batch, dtype=sizes.dtype,
            mode="eager" if name == "official" else name, way="official" if name == "official" else "ours",
            tuned=bool(run.arguments.get("best")), configs=run.arguments.get("best"), backend=setting.backend,
            images_per_s=sizes.batch / figures["p50_ms"] * 1e3 if figures["p50_ms"] else None,
            peak_bytes=peak_of(steppers[name], setting.device, others), **figures,
        )  # fmt: skip


def peak_of(stepper: Stepper, device: torch.device, others: int = 0) -> int | None:
    """The allocator's peak in a step, less what other ways hold; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    stepper.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - others


def profile(run: Run, stepper: Stepper) -> None:
    """The profiler's table of a few steps, as a row and as profile.txt."""
    on_gpu = torch.cuda.is_available()
    with torch.profiler.profile() as found:  # of the CPU, and of a GPU where there is one
        for _ in range(PROFILED):
            stepper.step()
        if on_gpu:
            torch.cuda.synchronize()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=80)
    (run.folder / "profile.txt").write_text(table)
    run.record("profile", table=table)


def memory(run: Run) -> None:
    """ViT-B under a cap: does a step fit with as many images as the plan says, and is the plan right? A row each."""
    for images, recompute in MEMORY_CASES:
        if run.left() <= 0:
            return
        setting = setting_for(replace(run, arguments={"model": "base", "batch": images, "cap_gib": CAP_GIB}))
        config = replace(setting.config, train=replace(setting.config.train, recompute=recompute))
        row = {"model": "base", "micro_batch": setting.sizes.batch, "recompute": recompute}
        row |= {"planned_bytes": predict_memory(step_size(config, 1)).total, "peak_bytes": None}
        try:
            stepper = started(partial(learning, setting, config))
            stepper.step()
            run.record("memory", **row | {"peak_bytes": peak_of(stepper, setting.device)}, fits=True, reason=None)
        except (torch.OutOfMemoryError, OutOfMemory) as error:
            run.record("memory", **row, fits=False, reason=str(error)[:300])
        stepper = None  # what it holds is not the next case's
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def warm(run: Run) -> None:
    """Compile the step, so that the cache on disk has it when it is timed."""
    setting = setting_for(run)
    with dry_compile(run):
        started(partial(ours, setting, "compiled"))
    run.record("warm", op=f"step {setting.sizes.name}", config=None)


@contextmanager
def dry_compile(run: Run) -> Iterator[None]:
    """In a dry run what would be compiled runs eagerly: a C++ compiler would take most of its time."""
    if run.dry:
        torch.compiler.set_stance("force_eager")
    yield


@contextmanager
def tuned_table(best: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Inside, the launch table has these configurations, by op."""
    with ExitStack() as stack:
        for kernel, op in tune.OPS.items():
            if op in best:
                stack.enter_context(tune.override(kernel, LaunchConfig(**best[op])))
        yield
