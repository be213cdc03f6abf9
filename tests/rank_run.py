"""The tiny run as one of several processes: as tiny_run.py, and each rank leaves what it did in OUTPUT.

rank_<r>.safetensors holds its weights, made whole, at the last save; steps_<r>.jsonl the images and collectives of
every step. A fourth argument RANK:STEP:SIGNAL makes that rank send itself that signal at the beginning of that step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import safetensors.torch
import tiny_run
from torch.distributed.tensor.debug import CommDebugMode

from mapet.training import learner
from mapet.training import loop as train
from mapet.training.parallel import gathered


def keep_weights(output: str) -> None:
    """Write rank_<r>.safetensors whenever the run saves."""
    save = train.Run.save

    def save_both(run: train.Run, done: int) -> None:
        path = Path(output) / f"rank_{run.world.rank}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(gathered(run.learner.task.state_dict(), keep=True), path)
        save(run, done)

    train.Run.save = save_both


def keep_steps(output: str) -> None:
    """Append to steps_<r>.jsonl after every step; collectives count by kind, all of them on the device's group."""
    original = learner.Learner.step

    def step(self, step, batch, **options):
        with CommDebugMode() as collectives:
            original(self, step, batch, **options)
        counts = {str(kind).rpartition(".")[2]: count for kind, count in collectives.get_comm_counts().items()}
        with (Path(output) / f"steps_{self.world.rank}.jsonl").open("a") as file:
            print(json.dumps({"step": step, "ids": batch["ids"].tolist(), "collectives": counts}), file=file)

    learner.Learner.step = step


def send_signal(rank: int, at: int, number: int) -> None:
    """Send signal `number` to this process at the beginning of step `at`, if it is rank `rank`."""
    original = learner.Learner.step

    def step(self, step, batch, **options):
        if self.world.rank == rank and step == at:
            os.kill(os.getpid(), number)
        original(self, step, batch, **options)

    learner.Learner.step = step


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    keep_weights(sys.argv[2])
    keep_steps(sys.argv[2])
    if len(sys.argv) > 4:
        send_signal(*map(int, sys.argv[4].split(":")))
    sys.exit(tiny_run.main(*sys.argv[1:4]))
