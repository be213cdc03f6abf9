"""The tiny run as one of several processes: as tiny_run.py, and every save leaves this rank's own weights in OUTPUT.

A fourth argument RANK:STEP:SIGNAL makes that rank send itself that signal at the beginning of that step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import safetensors.torch
import tiny_run

from mapet import learner, train


def keep_weights(output: str) -> None:
    """Write rank_<r>.safetensors whenever the run saves."""
    save = train.Run.save

    def save_both(run: train.Run, done: int) -> None:
        path = Path(output) / f"rank_{run.world.rank}.safetensors"
        safetensors.torch.save_file(run.learner.model.state_dict(), path)
        save(run, done)

    train.Run.save = save_both


def send_signal(rank: int, at: int, number: int) -> None:
    """Send signal `number` to this process at the beginning of step `at`, if it is rank `rank`."""
    original = learner.Learner.step

    def step(self, step, batch, **options):
        if self.world.rank == rank and step == at:
            os.kill(os.getpid(), number)
        original(self, step, batch, **options)

    learner.Learner.step = step


if __name__ == "__main__":
    keep_weights(sys.argv[2])
    if len(sys.argv) > 4:
        send_signal(*map(int, sys.argv[4].split(":")))
    sys.exit(tiny_run.main(*sys.argv[1:4]))
