"""The whole model through the Triton kernels, embedding and attention, in Triton's interpreter.

test_triton_interpreter.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check_golden import TOLERANCE, compare
from tasks import make_task, random_batch

from mapet.config import ModelConfig
from mapet.rng import StepRng
from mapet_kernels.permuted_embed import triton_backend as embed_backend
from mapet_kernels.two_stream_attention import triton_backend as attention_backend

GOLDEN = Path(__file__).parent / "data" / "mapet_official_forward_backward.safetensors"
MODEL = ModelConfig(image_size=16, patch_size=4, width=16, depth=2, heads=1, vocabulary=64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, TOLERANCE), (torch.float32, 1e-5)], ids=str)
def test_golden(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float) -> None:
    """Loss, logits and every gradient of the official code; both ops' kernels are in the run."""
    calls = []
    for module, name in ((embed_backend, "assemble"), (attention_backend, "forward"), (attention_backend, "backward")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, whole=whole, name=name: (calls.append(name), whole(*a))[1])
    result = compare(GOLDEN, dtype=dtype, backend="triton")
    assert result.largest <= tolerance and len(result.gradients) == 41
    assert set(calls) == {"assemble", "forward", "backward"}


def losses(backend: str, name: str, steps: int, *, compiled: bool = False) -> list[float]:
    """Losses of a few steps on fixed random images; from the third step on nothing may be compiled again."""
    task = make_task(name, 6, MODEL, backend=backend)
    forward = torch.compile(task, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else task
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    batch, curve = random_batch(MODEL, images=2), []
    for step in range(steps):
        draws = task.draw(2, StepRng(0, step))
        with torch._dynamo.config.patch(error_on_recompile=compiled and step >= 2):
            loss = forward(batch, draws, metrics=False)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize(("name", "steps"), [("mapet", 10), ("pim", 5)])
def test_losses_of_the_reference_backend(name: str, steps: int) -> None:
    expected = losses("reference", name, steps)
    assert losses("triton", name, steps) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]


def test_losses_of_a_compiled_model_which_is_one_graph_and_does_not_recompile() -> None:
    torch._dynamo.reset()
    assert losses("triton", "mapet", 3, compiled=True) == pytest.approx(losses("reference", "mapet", 3), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
