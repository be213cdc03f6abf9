"""The tiny run in one process of torchrun, with kills: elastic_rank.py NOTES KILLS CACHE OUTPUT CHANGES, see tiny_run.

KILLS are comma-separated ATTEMPT:RANK:STEP:WHERE, with WHERE one of

    step   at the beginning of the step, once the other processes wait for this one's gradients
    save   in the middle of saving after the step: the weights are written, the rest is not

There the process sends itself SIGKILL. Every process appends a line to NOTES/attempts.jsonl when it starts to train;
attempts are counted from 0.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import tiny_run
import torch

from mapet.training import checkpoint, learner
from mapet.training import loop as train

SETTLING = 0.5  # seconds after which the other processes have long been waiting


def die() -> None:
    """End this process as the kernel ends one that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(at: int) -> None:
    """SIGKILL at the beginning of step `at`."""
    original = learner.Learner.step

    def step(self, step, batch, **options):
        if step == at:
            time.sleep(SETTLING)
            die()
        original(self, step, batch, **options)

    learner.Learner.step = step


def kill_in_save(at: int) -> None:
    """SIGKILL while the checkpoint of step `at` is written, after its first file."""
    original = checkpoint._payloads

    def payloads(state):
        for number, file in enumerate(original(state)):
            if number and saving == [at]:
                time.sleep(SETTLING)
                die()
            yield file

    save, saving = checkpoint.CheckpointStore.save, []

    def save_noted(self, step, state):
        saving[:] = [step]
        return save(self, step, state)

    checkpoint._payloads, checkpoint.CheckpointStore.save = payloads, save_noted


def note_start(notes: Path, attempt: int) -> None:
    """Append attempt, rank, process id and the step that the run begins with."""
    original = train.Run.loop

    def loop(self, start, stop):
        line = {"attempt": attempt, "rank": self.world.rank, "pid": os.getpid(), "start": start}
        with (notes / "attempts.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return original(self, start, stop)

    train.Run.loop = loop


def main(notes: str, kills: str, *arguments: str) -> int:
    torch.set_num_threads(1)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    note_start(Path(notes), attempt)
    for kill in filter(None, kills.split(",")):
        *when, step, where = kill.split(":")
        if when == [str(attempt), os.environ["RANK"]]:
            {"step": kill_at_step, "save": kill_in_save}[where](int(step))
    return tiny_run.main(*arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
