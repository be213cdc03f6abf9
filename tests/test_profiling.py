"""The profiling scripts: what they count and how they attribute it, on a small step on the CPU."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mapet.config import SpeedConfig
from mapet.objectives.two_stream import TwoStreamTask

SCRIPTS = Path(__file__).parent.parent / "profiling"
NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","forward_kernel(int)","gpu__time_duration.sum","ns","21,500"
"0","7","forward_kernel(int)","launch__registers_per_thread","register/thread","168"
"0","7","forward_kernel(int)","launch__shared_mem_per_block","Kbyte/block","48"
"1","7","query_gradient_kernel","gpu__time_duration.sum","us","40.25"
"1","7","query_gradient_kernel","dram__bytes.sum","Gbyte","0.5"
"""


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by name, as they do when they are run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def small(**changes):
    return importlib.import_module("workload").Workload(batch=2, image_size=64, cut=5, **changes)


def test_timeline_attributes_forward_and_backward_to_parts(tmp_path: Path) -> None:
    timeline = importlib.import_module("step_timeline")
    summary, trace = timeline.measure(timeline.Timeline(small(), steps=2, output=tmp_path))
    parts = {part.part: part for part in summary.parts}
    for name in ("norms", "attention", "attention projections", "mlp", "head and loss", "embedding", "residuals"):
        assert parts[name].forward > 0, name
    for name in ("norms", "attention", "attention projections", "mlp", "residuals"):
        assert parts[name].backward > 0, name
    assert parts["optimizer"].forward > 0 and parts["optimizer"].backward == 0
    known = sum(part.total for name, part in parts.items() if name != "other")
    assert 0.5 * summary.wall < known <= 1.05 * summary.wall
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"part: mlp", "part: optimizer"} <= names
    assert "| mlp |" in timeline.as_table(summary)


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference"])
def test_what_a_backend_calls_is_attention(backend: str) -> None:
    workload, timeline = importlib.import_module("workload"), importlib.import_module("step_timeline")
    step = small().build()
    step.learner.task.backend = backend
    with workload.named_parts(step), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(0)
    inside = [event for event in profiler.events() if is_within(event, "mapet_kernels::two_stream_attention_packed")]
    assert len(inside) > 20 and {timeline._range_of(event) for event in inside} == {"attention"}


def is_within(event, name: str) -> bool:
    """Whether an event is called by the forward op of this name."""
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


def test_ranges_leave_nothing_behind() -> None:
    workload = importlib.import_module("workload")
    step = small().build()
    learner, seen = step.learner, []

    def note(name: str):
        seen.append(name)
        return workload.profiler_range(name)

    with workload.named_parts(step, note):
        step(0)
    assert set(seen) == set(workload.PARTS) - {"other"}
    before = len(seen)
    step(1)
    assert len(seen) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learner.task.modules())
    assert isinstance(learner.task, TwoStreamTask) and "_update" not in vars(learner)


def test_work_is_that_of_the_model_on_paper() -> None:
    roofline = importlib.import_module("step_roofline")
    workload = small(speed=SpeedConfig(skip_dropped=False))
    work = roofline.count(workload)
    learner = workload.build().learner
    model, width = learner.config.model, learner.config.model.width
    targets = model.tokens - 5
    content, rows = model.tokens + targets, model.tokens + 2 * targets
    all_blocks, last = model.depth - 1, 1
    hidden = int(model.mlp_ratio * width)
    mlp = 2 * 2 * width * hidden * 2 * (all_blocks * rows + last * targets)
    assert work["mlp", "forward"].flops == mlp and work["mlp", "backward"].flops == 2 * mlp
    projections = 2 * width * width * 2 * (all_blocks * (2 * rows + 2 * content) + last * (2 * targets + 2 * content))
    assert work["attention projections", "forward"].flops == projections
    pairs = model.tokens * (model.tokens + 2 * targets) * all_blocks + model.tokens * targets
    assert work["attention", "forward"].flops == 4 * 2 * pairs * width
    assert work["attention", "backward"].flops == 2.5 * work["attention", "forward"].flops
    head = 2 * 2 * targets * width * model.vocabulary
    assert work["head and loss", "forward"].flops == 3 * head, "the gradients are formed beside the loss"
    assert work["norms", "forward"].flops == 0 < work["norms", "forward"].bytes


def test_roofline_sorts_by_what_is_to_gain() -> None:
    roofline, timeline = (importlib.import_module(name) for name in ("step_roofline", "step_timeline"))
    rates = roofline.Rates(flops=1e12, bandwidth=1e10)
    work = {("mlp", "forward"): roofline.Work(2e9, 1e6), ("norms", "forward"): roofline.Work(0, 1e7)}
    rows = roofline.table(work, [timeline.PartTime("mlp", 3.0, 0.0), timeline.PartTime("norms", 9.0, 0.5)], rates)
    assert [(r.part, r.direction) for r in rows] == [("norms", "forward"), ("mlp", "forward"), ("norms", "backward")]
    assert rows[1].floor == pytest.approx(2.0) and rows[0].floor == pytest.approx(1.0)
    assert "| all | | | | 3.000 | 12.500 | 9.500 |" in roofline.as_markdown(rows, rates)
    measured = roofline.measure_rates(torch.device("cpu"), torch.float32)
    assert all(math.isfinite(rate) and rate > 1e6 for rate in (measured.flops, measured.bandwidth))


def test_memory_timeline_knows_who_holds_what(tmp_path: Path) -> None:
    timeline = importlib.import_module("memory_timeline")
    workload = small()
    moments = timeline.measure(workload)
    held = moments.at_peak()
    step = workload.build()
    weights, batch = 4 * sum(p.numel() for p in step.learner.task.parameters()), step.batch
    # Weights and two moments each; and the step counters, the batch and the buffers, which are small.
    assert 3 * weights < held[timeline.BEFORE] < 3.05 * weights + batch["images"].numel() + 8 * batch["tokens"].numel()
    first, last = moments.live[0].sum(), moments.live[-1].sum()
    assert held["mlp, forward"] > held["norms, forward"] > 0 and first < moments.live.max(axis=0).sum()
    assert last <= first + weights + 2**20, "a step leaves its gradients and nothing else"
    picture = timeline.draw(moments, tmp_path / "memory.png", "a step")
    assert picture.stat().st_size > 10_000 and "| all |" in timeline.as_table(moments)


def test_device_time_counts_overlapping_kernels_once() -> None:
    timeline = importlib.import_module("step_timeline")
    ranges = [SimpleNamespace(start=start, end=end) for start, end in ((5, 9), (0, 4), (3, 6), (20, 21))]
    assert timeline._covered(ranges) == 10


def test_data_pipeline_measures_every_stage(tmp_path: Path) -> None:
    pipeline = importlib.import_module("data_pipeline")
    cache = pipeline.random_cache(tmp_path, 24, image_size=32, grid=2)
    speeds = pipeline.run(pipeline.DataPipeline(cache=cache, views="digits", batch=4, workers=(0,), steps=3))
    stages = ["cache and loader, 0 workers", "decoded random views, 0 workers", "copy to the device", "colour jitter"]
    assert list(speeds) == stages
    assert all(speed > 0 for speed in speeds.values())


def test_counters_become_a_table() -> None:
    counters = importlib.import_module("op_counters")
    kernels = counters.parse(NCU)
    assert kernels == [
        {"kernel": "forward_kernel", "time us": 21.5, "registers": 168.0, "shared KB": 48.0},
        {"kernel": "query_gradient_kernel", "time us": 40.25, "DRAM MB": 500.0},
    ]
    assert "2 kernels, 61.8 us" in counters.as_table(kernels)
    with pytest.raises(ValueError, match="did any kernel run"):
        counters.parse("==ERROR== no kernels were profiled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why it cannot run without a GPU")
def test_counters_say_what_they_need() -> None:
    done = subprocess.run([sys.executable, SCRIPTS / "op_counters.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and ("ncu" in done.stderr or "CUDA device" in done.stderr)
