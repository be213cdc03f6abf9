"""The tiny run as one of several processes, in which one rank runs out of memory: as rank_run.py, with RANK:LIMIT:CALL.

In that rank, a forward pass of more than LIMIT images runs out of memory, from the CALL-th of a step on.
"""

from __future__ import annotations

import sys

import rank_run
import tiny_run
import torch

from mapet.training import learner


def run_out(rank: int, limit: int, call: int) -> None:
    """Let `rank` run out of memory."""
    forward, accumulate = learner.Learner._forward_backward, learner.Learner._accumulate
    calls = {"done": 0}

    def counted(self, *arguments, **options):
        calls["done"] = 0
        return accumulate(self, *arguments, **options)

    def limited(self, batch, *arguments):
        calls["done"] += 1
        if self.world.rank == rank and len(batch["tokens"]) > limit and calls["done"] >= call:
            raise torch.OutOfMemoryError("injected")
        return forward(self, batch, *arguments)

    learner.Learner._accumulate, learner.Learner._forward_backward = counted, limited


if __name__ == "__main__":
    rank_run.keep_weights(sys.argv[2])
    run_out(*map(int, sys.argv[4].split(":")))
    sys.exit(tiny_run.main(*sys.argv[1:4]))
