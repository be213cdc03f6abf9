"""One pass over a micro-batch recorded as a CUDA graph and replayed: the host launches it in one call.

What a recording needs: the same shapes every time, inputs and results at the same addresses, and gradients that stay
where they are between steps (`zero_grad(set_to_none=False)`), to which a replay adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WARM_UP = 3
"""Passes before recording, in which libraries choose algorithms and take their workspaces."""

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a call; gives what repeats it, and where its result lies."""


def record_cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record `run`, which has run before on a side stream, as such a recording asks for."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: the loader's thread pins memory meanwhile, which would break a recording of all threads.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


class GraphedPass:
    """A forward and backward pass over inputs of fixed shapes, that is recorded at once and replayed by every call.

    Args:
        run: inputs -> result, adding to the gradients of `parameters`.
        inputs: tensors of the shapes to come; their values do not matter.
        parameters: those with gradients, which keep their values through the warm-up.
        record: what makes the recording.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        inputs: Iterable[Tensor],
        parameters: Iterable[Tensor],
        record: Record = record_cuda_graph,
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        parameters = [p for p in parameters if p.requires_grad]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        before = [p.grad.clone() for p in parameters]
        self._warm_up(run)
        for p, gradient in zip(parameters, before, strict=True):
            p.grad.copy_(gradient)
        self.replay, self.result = record(lambda: run(*self.inputs))
        for p, gradient in zip(parameters, before, strict=True):
            p.grad.copy_(gradient)  # a record that runs as it records has added to them

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result of a pass over these inputs; valid until the next call."""
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)
        self.replay()
        return self.result

    def _warm_up(self, run: Callable[..., Tensor]) -> None:
        if self.inputs[0].device.type != "cuda":
            run(*self.inputs)
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
