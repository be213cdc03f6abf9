"""Loss and metrics on the images that are held out, after every epoch and after the last step.

Their batches come through the same feed as those to learn from, in their turn, so that the same workers make them
ahead. Every time they are the same images with the same draws (see mapet/data/loader.py), in eval mode and in the run's
precision: the curve over epochs is that of the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mapet.distributed import StopRequest
from mapet.errors import OutOfMemory
from mapet.rng import StepRng, global_rng_state, set_global_rng_state
from mapet.task import Batch
from mapet.training.learner import Learner, part_of
from mapet.training.limits import advice

PREFIX = "val_"
"""Of what is logged."""


class Validation:
    """What a run is judged on: `images` that are held out, 0 for none."""

    def __init__(self, learner: Learner, images: int) -> None:
        self.learner, self.images, self.steps = learner, images, learner.steps
        self.batches = range(-1, -1 - self.steps.held_out, -1)

    def due(self, done: int) -> bool:
        """Whether the run is judged after so many steps."""
        return bool(self.batches) and (done == self.steps.last or done % self.steps.per_epoch == 0)

    def order(self, start: int, *, now: bool) -> Collection[int]:
        """The batches of a run from step `start` on, those to be judged on after each step that they are due after."""
        if not self.batches:
            return range(start, self.steps.last)
        order = list(self.batches) if now else []
        for step in range(start, self.steps.last):
            order += [step, *self.batches] if self.due(step + 1) else [step]
        return order

    def run(self, done: int, take: Callable[[], Batch | None], stop: StopRequest) -> dict[str, float]:
        """Means over all held-out images by name, the same in all processes, if due; all of them call it.

        Empty too where the run has to stop instead: before each batch the processes agree on whether some process got
        a signal or, as `take` gave None, no batch. Weights, modes and random states are left as they were.
        """
        if not self.due(done):
            return {}
        sums: dict[str, Tensor] = {}
        with judging(self.learner):
            for number in self.batches:
                batch = take()
                stop.post(lacking=batch is None)
                verdict = stop.agreed()
                if batch is None or verdict.signal or verdict.lacking:
                    return {}
                self._add(sums, number, batch)
        world = self.learner.world
        means = world.mean(torch.stack(list(sums.values()))) * (world.size / self.images)
        return {f"{PREFIX}{name}": value for name, value in zip(sums, means.tolist(), strict=True)}

    def _add(self, sums: dict[str, Tensor], number: int, batch: Batch) -> None:
        """Add what this process's images of a batch amount to, micro-batch by micro-batch.

        Every process makes as many passes as the first one, which has the most images, since sharded weights are
        gathered in each: where it has no images left, with one that counts for nothing.
        """
        learner, config, world = self.learner, self.learner.config, self.learner.world
        share, micro, whole = self.steps.share, learner.steps.micro, config.optim.global_batch
        images = min(whole, self.images + (number + 1) * whole)  # of this batch, in all processes
        first = world.rank * share
        own = min(share, images - first)
        batch = {name: value.to(world.device, non_blocking=True) for name, value in batch.items()}
        draws = learner.task.draw(whole, StepRng(config.train.seed, number, world.device))
        draws = part_of(draws, slice(first, first + share))
        for begin in range(0, min(share, images), micro):
            count = max(min(micro, own - begin), 0)
            part = slice(begin, begin + count) if count else slice(0, 1)
            for name, value in self._values(part_of(batch, part), part_of(draws, part)).items():
                value = value.double() * count if count else torch.zeros_like(value, dtype=torch.float64)
                sums[name] = sums.get(name, 0) + value

    def _values(self, batch: Batch, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        learner, device = self.learner, self.learner.world.device
        try:
            with torch.autocast(device.type, learner.dtype, enabled=learner.dtype is not None):
                return learner.task(batch, learner.task.ready(draws, device), metrics=True)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(advice(learner.config, device, learner.world.size, learner.steps.micro)) from error


@contextmanager
def judging(learner: Learner) -> Iterator[None]:
    """Eval mode without gradients; modes, which differ between modules, and random states are put back."""
    task, device = learner.task, learner.world.device
    random, training = global_rng_state(device), [module for module in task.modules() if module.training]
    task.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if hasattr(task, "reshard"):  # what is around the units stays whole after a pass that no backward one follows
            task.reshard()
        set_global_rng_state(random, device)
