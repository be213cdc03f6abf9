"""The processes of one fit: each holds a share of the rows, and all hold the same centroids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """This process among those of `group`, by default of the default group where there is one; else it is alone."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        together = not alone and dist.is_available() and dist.is_initialized()
        if group is not None and not together:
            raise ValueError("a group was given, but torch.distributed is not initialised")
        self.group = (group or dist.group.WORLD) if together else None
        self.rank = dist.get_rank(self.group) if together else 0
        self.size = dist.get_world_size(self.group) if together else 1
        if self.rank < 0:
            raise ValueError("this process does not belong to the group that was given")

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """A small Python object of every process, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, task: Callable[[], T]) -> T:
        """Run `task` everywhere. If it raises ValueError in some process, it does in all, with the same text."""
        result: Any = None
        problem = ""
        try:
            result = task()
        except ValueError as error:
            if self.size == 1:
                raise
            problem = str(error)
        problems = {f"process {rank}: {text}": text for rank, text in enumerate(self.gather(problem)) if text}
        if problems:
            raise ValueError("; ".join(problems))
        return result

    def from_first(self, task: Callable[[], T]) -> T:
        """The result of `task`, run in the first process alone; its ValueError is raised in all."""
        result: Any = self.together(lambda: task() if self.rank == 0 else None)
        if self.size > 1:
            answer = [result]
            dist.broadcast_object_list(answer, src=dist.get_global_rank(self.group, 0), group=self.group)
            result = answer[0]
        return result
