"""The pre-training loop. `pretrain(config)` is a run; mapet/training/learner.py is one optimizer step.

A run is a function of its configuration: what step t does depends on (seed, t) and on the weights before it, not on the
number of processes, micro-batches or loader workers, nor on stops and resumes in between (up to the rounding of sums
that are taken in another order).

The host reads from the device every `log_every` steps and before a checkpoint, and there it learns of a loss or
gradient that was not finite: so a run stops up to `log_every` steps late, but with the weights from before the failure.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals

from mapet.config import RunConfig, to_dict
from mapet.data.feed import Feed, FeedStopped
from mapet.data.loader import run_batches, split_images
from mapet.distributed import StopRequest, World, connect, launch
from mapet.errors import CheckpointError, DataError, TrainingError
from mapet.files import UnreadableFile, read_bytes, write_whole
from mapet.folders import check_place, locked, set_aside
from mapet.objectives import objective
from mapet.progress import ProgressDisplay, make_progress
from mapet.rng import deterministic_algorithms
from mapet.task import Batch, Data
from mapet.training.budget import FILE as BUDGET
from mapet.training.budget import Clocks, budgeted
from mapet.training.checkpoint import FOLDER, CheckpointStore, not_finite
from mapet.training.learner import Learner
from mapet.training.limits import cap_memory, within_memory
from mapet.training.metrics import BOARD, FILE_NAME, MetricsLog, StepMetrics, check_ours, import_trackers
from mapet.training.precision import settled
from mapet.training.schedule import StepPlan, learning_rate, plan_steps
from mapet.training.validation import Validation
from mapet.words import say

SMALLEST_SCALE = 2.0**-14  # thirty halvings of GradScaler's 65536: no scale will help
IDS_SHOWN = 32
FAILURE = "failed_step_{step}.json"
BEGUN = ".mapet.begun"
RUN_FILES = (FAILURE.format(step="*"), BUDGET, BOARD, FILE_NAME, FOLDER)
"""All that a run writes into its folder, as patterns."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are None where nothing was logged."""

    step: int
    """Optimizer steps done, earlier parts of the run included."""
    last_step: int
    """Optimizer steps that the configuration asks for."""
    checkpoint: Path | None
    """The newest one; None where the run ended before there was any."""
    loss: float | None
    """Of the last report, as is what the method logs besides: the accuracy, or `val_loss` of held-out images."""
    metrics: dict[str, float]
    best_loss: float | None
    """The smallest loss reported in the whole run, and its step; in the main process."""
    best_step: int | None
    signal: int
    """The signal that ended the run early, or 0."""

    @property
    def exit_code(self) -> int:
        """For the process: 0, or 143 after SIGTERM and 130 after Ctrl-C."""
        return 128 + self.signal if self.signal else 0


def pretrain(config: RunConfig, *, clocks: Clocks | None = None) -> TrainResult:
    """Run pre-training, or go on with it; in every process of torchrun alike. `clocks` are those of train.budget.

    Raises:
        ConfigError: options that cannot work, here, together or with this data.
        DataError: the cache is damaged, or not for this model; another process is at work in the run's folder, or it
            cannot be written; or a data worker died or stalled, in some process. What was learned is saved before.
        CheckpointError: every checkpoint is damaged, one is of another configuration, or one cannot be written.
        TrainingError: a loss or gradient norm is not finite; the text names step and images.
        OutOfMemory: a step does not fit the device; the text says what to change.
    """
    check_place(config.train.output, "run")
    with ExitStack() as stack:
        world = stack.enter_context(connect(config.train.device))
        stop = stack.enter_context(StopRequest(world))
        stack.enter_context(deterministic_algorithms(config.train.deterministic))
        cap_memory(config.train.gpu_memory, world.device)
        again = "the same command" + ("" if config.train.resume else ", without --fresh,")
        # What a torchrun that has begun afresh starts anew goes on with that.
        if not config.train.resume and world.on_main(lambda: is_begun(config.train.output)):
            config = replace(config, train=replace(config.train, resume=True))
        data = objective(config.objective.name).open(config)
        config, why = settled(config, world)
        config, fits = within_memory(config, world.size)
        if fits and world.is_main:
            say(fits)
        steps = plan_steps(config, len(data), world.size)
        import_trackers(config.train.trackers)  # one that is missing is refused before anything is written
        world.on_main(lambda: take_folder(config, stack))
        if config.train.budget:
            config, decision = budgeted(config, world, data, steps, clocks, stop)
            steps = plan_steps(config, len(data), world.size)
            if world.is_main:
                say(decision)
        run = Run(config, world, data, steps, again)
        start = run.resume({"train.precision": f"{why}; to go on here, name the earlier one"} if why else {})
        if world.is_main:
            run.check_room()
            log = MetricsLog(config.train.output, start, config.train.trackers, to_dict(config))
            run.log = stack.enter_context(log)
            run.display = stack.enter_context(make_progress(steps.last, start))
        if why:
            run.tell(f"precision {config.train.precision}, {why}")
        if start:
            run.tell(f"going on from step {start}, {run.store.path(start)}")
        return run.loop(start, stop)


def take_folder(config: RunConfig, stack: ExitStack) -> None:
    """Lock the run's folder until the stack ends, and set an earlier run aside that is not wanted."""
    folder = config.train.output
    stack.enter_context(locked(folder, "run"))
    if not config.train.resume:
        if aside := set_aside(folder, RUN_FILES):
            say(f"the earlier run is now in {aside}")
        if launch():
            with suppress(OSError):
                write_whole(folder / BEGUN, launch())
    elif not os.path.lexists(folder / FOLDER):
        check_ours(folder / FILE_NAME)
    elif not (folder / FOLDER).is_dir():
        raise DataError(f"{folder / FOLDER} is no folder, and a run keeps its checkpoints there; move it away")


def is_begun(folder: Path) -> bool:
    """Whether the torchrun of this process has begun a run here, with nothing of an earlier one."""
    try:
        return bool(launch()) and read_bytes(folder / BEGUN) == launch().encode()
    except UnreadableFile:
        return False


class Run:
    """The loop around a learner: data in, numbers and checkpoints out. The main process has `log` and `display`.

    `again` is what goes on with the run, in words.
    """

    def __init__(
        self, config: RunConfig, world: World, data: Data, steps: StepPlan, again: str = "the same command"
    ) -> None:
        self.config, self.world, self.data, self.steps, self.again = config, world, data, steps, again
        self.learner, self.split = Learner(config, world, steps), split_images(len(data), config)
        self.validation = Validation(self.learner, self.split.held)
        self.store = CheckpointStore(config.train.output / FOLDER, config.train.keep)
        self.log: MetricsLog | None = None
        self.display: ProgressDisplay | None = None

    def resume(self, notes: Mapping[str, str] | None = None) -> int:
        """Load the newest valid checkpoint where there is one and it is wanted; the steps done. `notes`: see there."""
        if not self.config.train.resume:  # what was there has been set aside
            return 0
        newest = self.world.on_main(self.store.newest_valid)
        if newest is None:
            return 0
        loaded = self.store.load(newest, self.config, notes)
        if loaded.state.trainer.get("data") != self.data.fingerprint():
            raise CheckpointError(
                f"checkpoint {loaded.folder} learned from other images or tokens than {self.config.data.cache} holds; "
                "give the cache it began with, another train.output, or start afresh with `mapet pretrain --fresh`"
            )
        try:
            self.learner.load(loaded.state)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {loaded.folder} is not one of this run: {error}") from error
        return newest

    def loop(self, start: int, stop: StopRequest) -> TrainResult:
        """Steps `start` to the last one; or until a stop signal, or until the data ends in some process.

        The next batch is taken while the device computes, and the processes agree between two steps, so that a process
        without data leaves none of the others waiting for its gradients: all keep what has been learned, then end.
        """
        train, last = self.config.train, self.steps.last
        clock, done, saved, metrics = Clock(), start, start, None
        owed = self.owes_validation(start)
        with self.batches(start, stop, owed) as batches:
            if owed:
                metrics = self.report(done, clock, batches, stop)
            batch, failure = take(batches, clock) if start < last else (None, None)
            stop.post(lacking=batch is None and start < last)
            verdict = stop.agreed()
            while done < last and batch is not None and not verdict.lacking:
                reporting = done + 1 == last or (done + 1) % train.log_every == 0 or self.validation.due(done + 1)
                self.learner.step(done, batch, metrics=reporting)
                done += 1
                if reporting:
                    metrics = self.report(done, clock, batches, stop)
                if done < last:
                    batch, failure = take(batches, clock)
                stop.post(lacking=done < last and batch is None)
                verdict = stop.agreed()
                if done == last or done % train.save_every == 0 or verdict.signal:
                    saved = self.save(done)
                if verdict.signal:
                    break
            if verdict.lacking and done > saved:
                saved = self.save(done)
        if verdict.lacking and not verdict.signal:
            raise DataError(self.lost_data(failure, saved)) from failure
        if verdict.signal and done < last:
            why = "the end of its torchrun" if stop.orphaned else Signals(verdict.signal).name
            self.tell(f"stopped by {why} after step {done}; {self.again} goes on from there")
        best = self.log.best_loss if self.log else None
        return TrainResult(
            step=done,
            last_step=last,
            checkpoint=self.store.path(saved) if saved else None,
            loss=metrics.loss if metrics and done > start else None,
            metrics=metrics.metrics if metrics else {},
            best_loss=best.value if best else None,
            best_step=best.step if best else None,
            signal=verdict.signal,
        )

    def owes_validation(self, start: int) -> bool:
        """Whether the run was stopped after step `start` before it was judged, as it was due there."""
        due = start > 0 and self.validation.due(start)
        return due and self.world.on_main(lambda: self.log is not None and start not in self.log.validated)

    def batches(self, start: int, stop: StopRequest, owed: bool = False) -> Feed[Batch]:
        """The batches of this process from step `start` on, before them those of a validation that is `owed`."""
        order = self.validation.order(start, now=owed)
        return run_batches(self.config, self.data, self.world, order, lambda: bool(stop.received))

    def lost_data(self, failure: DataError | None, saved: int) -> str:
        """What happened to the data, here or elsewhere, and what is kept."""
        what = (
            str(failure) if failure else "another process of this run has no data to go on with; its message says why"
        )
        kept = f"The checkpoint of step {saved} is kept, and {self.again} goes on from it" if saved else ""
        return f"{what}. {kept or 'There is no checkpoint yet'}"

    def report(self, done: int, clock: Clock, batches: Feed[Batch], stop: StopRequest) -> StepMetrics:
        """Read the numbers since the last report, judge the run if that is due, and show all of it.

        TrainingError if one was not finite.
        """
        numbers = self.learner.read()
        self.check()
        seconds, waited = clock.lap()
        held_out = self.validation.run(done, lambda: take(batches, clock)[0], stop)
        clock.lap()  # the speed is that of the steps
        optim = self.config.optim
        metrics = StepMetrics(
            step=done,
            epoch=done / self.steps.per_epoch,
            loss=numbers.loss,
            metrics={**numbers.metrics, **held_out},
            lr=learning_rate(optim, self.steps.per_epoch, done - 1),
            gradient_norm=numbers.gradient_norm,
            images_per_second=numbers.steps * optim.global_batch / seconds,
            data_wait=waited / seconds,
            eta_seconds=(self.steps.last - done) * seconds / numbers.steps if numbers.steps else math.nan,
            loss_scale=numbers.loss_scale,
        )
        if self.log is not None and self.display is not None:
            self.log.write(metrics)
            self.display.show(metrics)
        if numbers.loss_scale < SMALLEST_SCALE:
            raise TrainingError(
                f"fp16: gradients still overflow at a loss scale of {numbers.loss_scale:g}; train in bf16 or fp32, or "
                "lower optim.lr"
            )
        return metrics

    def save(self, done: int) -> int:
        """Write a checkpoint, and say of which step.

        TrainingError instead if an update was called off before it, or something in it is not finite.
        """
        self.check()
        state = self.learner.state()
        if broken := self.world.on_main(lambda: not_finite(state)):
            raise TrainingError(
                f"after step {done}: {broken} is not finite, so that no checkpoint was written. Lower optim.lr or "
                f"optim.weight_decay; {self.earlier()}"
            )
        state.trainer["data"] = self.data.fingerprint()
        self.world.on_main(lambda: self.store.save(done, state))
        return done

    def check_room(self) -> None:
        """Warn where the disk has no room for another checkpoint."""
        copies = 3 + (self.config.train.ema_decay > 0)  # with both moments of AdamW
        needed = copies * sum(parameter.nbytes for parameter in self.learner.task.parameters())
        if (free := shutil.disk_usage(self.config.train.output).free) < needed:
            warnings.warn(
                f"a checkpoint of this run takes about {needed / 2**20:.1f} MiB, and the disk of "
                f"{self.config.train.output} has {free / 2**20:.1f} MiB free: make room, or the run ends at its first",
                stacklevel=2,
            )

    def earlier(self) -> str:
        """What there is to go on from after a failure."""
        steps = self.store.steps()
        if not steps:
            return f"there is no checkpoint in {self.store.folder} yet"
        return f"the checkpoints in {self.store.folder} are from before, the newest of step {steps[-1]}"

    def tell(self, text: str) -> None:
        """A line for the person watching."""
        if self.display is not None:
            self.display.note(text)

    def check(self) -> None:
        """Raise TrainingError, with step and images, if an update was called off."""
        failure = self.learner.failed()
        if failure is None:
            return
        state = self.learner.state()
        broken = self.world.on_main(lambda: not_finite(state))
        weights = "The run stopped before the weights changed."
        if broken:
            weights = f"An update before it was too large: {broken} is not finite any more."
        ids = self.split.trained_ids(failure.step, self.config.optim.global_batch).tolist()
        images = ", ".join(map(str, ids[:IDS_SHOWN]))
        if len(ids) > IDS_SHOWN:
            path = self.config.train.output / FAILURE.format(step=failure.step)
            where = f"in {path}"
            if self.world.is_main:
                try:
                    write_whole(path, json.dumps({"step": failure.step, "ids": ids}))
                except OSError as error:  # the failure itself is still to be told
                    where = f"not kept: {error.strerror or error}"
            images += f", ... (all {len(ids)} {where})"
        raise TrainingError(
            f"step {failure.step} (counted from 0): loss {failure.loss:g}, gradient norm {failure.gradient_norm:g}. "
            f"{weights} Images of its batch: {images}. Lower optim.lr or try optim.clip=1; {self.earlier()}"
        )


def take(batches: Feed[Batch], clock: Clock) -> tuple[Batch | None, DataError | None]:
    """The next batch; None where there is none, since a signal came while it was waited for or for the error beside."""
    with clock.waiting():
        try:
            return next(batches), None
        except FeedStopped:
            return None, None
        except DataError as error:
            return None, error


class Clock:
    """Time of the steps since the last lap, and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self.began, self.waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting."""
        since = time.perf_counter()
        yield
        self.waited += time.perf_counter() - since

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and those of them spent waiting; starts the next lap."""
        now = time.perf_counter()
        seconds, waited = now - self.began, self.waited
        self.began, self.waited = now, 0.0
        return seconds, waited
