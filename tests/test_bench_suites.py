"""The suites at tiny sizes: what is checked, timed and recorded, by both front ends. No test asserts a time."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command_line
from bench import (
    ablation,
    conftest,
    contest,
    gpu,
    kernels_suite,
    memory,
    options,
    pretrain,
    records,
    roofline,
    step,
    suites,
    timing,
    tokenizing,
)
from bench.contest import Arena, Contest, Entrant, Rules, Timed, measure, two_passes
from bench.guard import Unavailable
from bench.options import Options
from mapet.config import ModelConfig
from mapet_kernels.registry import REGISTRY

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
SMALL = {
    "batch": (2,), "dtype": ("fp32",), "device": "cpu", "image_size": (32,), "patch_size": (8,), "compile": False,
    "images": 24, "workers": 0, "repeats": 2, "seconds": 0.01,
}  # fmt: skip
RATES = roofline.Rates(1e10, {"fp32": 1e11})
RULES = Rules(CPU, timing.CpuClock(), 2, 0.01, timing.Deadline(float("inf")), RATES)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that need no measuring, and short blocks."""
    monkeypatch.setattr(roofline, "measure", lambda *_: RATES)
    monkeypatch.setitem(pretrain.STEPS, "cpu", 1)
    monkeypatch.setattr(pretrain, "LOADER_STEPS", 1)


def small(suite: str, folder: Path, **changes) -> dict:
    """The record of a suite at small sizes."""
    (path,) = suites.run(Options(suite=(suite,), output=folder, **(SMALL | changes)))
    return json.loads(path.read_text())


def fake(ways: dict, base: str = "ours", phases: tuple[str, ...] = ("run",), **arena) -> Contest:
    """A contest whose results are numbers that should be 1, with an error of 0.1 allowed."""

    @contextmanager
    def opened() -> Iterator[Arena]:
        yield Arena(ways, lambda value: {"value": abs(value - 1) / 0.1}, **arena)

    return Contest("fake", "a contest", {"batch": 4}, phases, tuple(ways), base, "fp32", opened)


def way(value: float, **more):
    """The builder of a way with this result."""
    return lambda: Entrant({"run": Timed(lambda: sum(range(100)))}, lambda: value, **more)


def broken() -> Entrant:
    raise RuntimeError("no kernel image\nand a traceback")


def missing() -> Entrant:
    raise Unavailable("not installed")


def test_only_checked_ways_are_timed_and_compared() -> None:
    other = way(5.0, another_task="another task: sorting")
    ways = {"ours": way(1.0), "peer": way(1.05), "wrong": way(1.2), "nan": way(math.nan), "broken": broken}
    costs = {"run": roofline.Cost(1e9, 10)}
    entry = measure(fake(ways | {"missing": missing, "context": other}, images=8, costs=costs), RULES)
    rows = entry["ways"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "ours": "timed", "peer": "timed", "wrong": "wrong", "nan": "wrong", "broken": "failed",
        "missing": "unavailable", "context": "timed",
    }  # fmt: skip
    assert rows["wrong"]["reason"] == "value errs 2 times as much as is allowed"
    assert rows["wrong"]["error_share"] == {"value": 2.0}, "the numbers stay in the record"
    assert "timings" not in rows["wrong"] and "times_as_long" not in rows["nan"]
    assert rows["broken"]["reason"] == "RuntimeError: no kernel image"
    timing_ = rows["peer"]["timings"]["run"]
    assert timing_["noise"] == pytest.approx((timing_["p80_ms"] - timing_["p20_ms"]) / timing_["p50_ms"], abs=0.1)
    assert timing_["repeats"] == 2 and rows["peer"]["times_as_long"]["run"] > 0 and "times_as_long" not in rows["ours"]
    seconds = timing_["p50_ms"] / 1e3
    assert rows["peer"]["images_per_second"]["run"] == pytest.approx(8 / seconds, rel=1e-2)
    assert rows["peer"]["tflop_per_s"]["run"] == pytest.approx(1e9 / seconds / 1e12, rel=1e-2)
    assert rows["peer"]["roofline_fraction"]["run"] == pytest.approx(1e9 / 1e11 / seconds, rel=1e-2)
    assert "times_as_long" not in rows["context"] and rows["context"]["another_task"].startswith("another task")
    assert "wrong: value errs 2 times" in "\n".join(contest.lines(entry))
    rows = measure(fake({"ours": way(2.0), "peer": way(1.0)}), RULES)["ways"]
    assert rows["peer"]["status"] == "timed" and "times_as_long" not in rows["peer"], "no ratio where ours is wrong"


def test_a_time_limit_and_inputs_that_cannot_be_made() -> None:
    late = replace(RULES, deadline=timing.Deadline(0.0))
    assert measure(fake({"ours": way(1.0)}), late)["ways"]["ours"] == {"status": "not run", "reason": "time limit"}

    @contextmanager
    def opened():
        raise MemoryError("too large")
        yield

    rows = measure(replace(fake({"ours": way(1.0)}), open=opened), RULES)["ways"]
    assert rows["ours"] == {"status": "failed", "reason": "MemoryError: too large"}


def test_options_that_cannot_work_are_refused(tmp_path: Path, monkeypatch) -> None:
    for changes, message in (
        ({"gpu_memory": "16GiB"}, "caps the memory of a GPU"),
        ({"batch": (0,)}, "--batch must be at least 1, got 0"),
        ({"device": "meta"}, "device must be cpu or cuda, got meta"),
        ({"patch_size": (7,)}, "not divisible"),
        ({"repeats": -1}, "--repeats must not be negative"),
        ({"model": ()}, "--model needs at least one value"),
    ):
        with pytest.raises(ValueError, match=message):
            suites.run(Options(suite=("step",), output=tmp_path, **(SMALL | changes)))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no CUDA device"):
            options.chosen_device("cuda")
    assert not list(tmp_path.iterdir())


def test_ways_can_be_chosen_by_name(tmp_path: Path) -> None:
    (made,) = suites.chosen("step", Options(**SMALL, ways=("official",)), CPU)
    assert made.ways == ("ours", "official"), "with what they are compared with"
    with pytest.raises(ValueError, match="--ways: step has no warp; its ways are official, official_with_masks, ours"):
        suites.chosen("step", Options(**SMALL, ways=("warp",)), CPU)


def test_a_suite_is_a_command_for_short(monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setitem(command_line.COMMANDS, "run", (Options, asked.append))
    for arguments, wanted in (
        (
            ["--suite", "step", "kernels", "--model", "base", "--dtype", "bf16", "fp16", "--batch", "4"],
            Options(("step", "kernels"), ("base",), (4,), ("bf16", "fp16")),
        ),
        ([], Options()),
        (["ablation", "--batch", "2"], Options(("ablation",), batch=(2,))),
        (["kmeans-fit"], Options(("kmeans_fit",))),
        (["run", "--suite", "curves"], Options(("curves",))),
    ):
        command_line.main(arguments)
        assert asked.pop() == wanted
    assert set(suites.CONTESTS) == set(options.SUITES) and Options().suite == options.QUICK
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("run", "report", "compare", "plot", "aot"))


def test_without_tyro_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('No module named tyro', name='tyro')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "bench", "attention"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert "needs the package tyro: pip install tyro" in result.stderr and "CONTRIBUTING.md" in result.stderr


def test_sigterm_and_a_time_limit_keep_finished_contests(tmp_path: Path) -> None:
    def killed() -> Entrant:
        signal.raise_signal(signal.SIGTERM)

    contests = [fake({"ours": way(1.0)}), fake({"ours": killed}), fake({"ours": way(1.0)})]
    path, entries = suites.run_contests("fake", "x", contests, RULES, tmp_path)
    record = json.loads(path.read_text())
    assert record["stopped"] == "interrupted after 1 of 3 contests" and len(record["contests"]) == len(entries) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    late = replace(RULES, deadline=timing.Deadline(0.0))
    path, _ = suites.run_contests("fake", "late", contests, late, tmp_path)
    assert json.loads(path.read_text())["stopped"] == "time limit after 0 of 3 contests"


def test_a_draft_survives_a_kill_and_a_record_is_never_overwritten(tmp_path: Path) -> None:
    draft = records.Draft("attention", "x", tmp_path)
    draft.write({"contests": [1]})
    draft.write({"contests": [1, 2]})
    assert json.loads(draft.partial.read_text())["contests"] == [1, 2] and not draft.path.exists()
    draft.path.write_text("older")
    with pytest.raises(FileExistsError):
        draft.finish()
    assert draft.path.read_text() == "older"


class FakeClock:
    """Calls take what they return."""

    def time(self, call):
        return (result := call()), result


def test_ways_are_timed_in_turn_and_slow_ones_less_often() -> None:
    log: list[str] = []

    def passes(name: str, seconds: float) -> Entrant:
        return Entrant(two_passes(lambda: log.append(name) or seconds, lambda outputs: outputs))

    ways = {"fast": passes("fast", 0.1), "slow": passes("slow", 10.0)}
    seconds, reasons = timing.interleaved(
        ways, FakeClock(), repeats=5, budget=100.0, deadline=timing.Deadline(1e9), guard=lambda call: (call(), None)
    )
    assert not reasons and len(seconds["fast"]["both"]) == 5 and len(seconds["slow"]["forward"]) == 3
    samples = log[12:]  # after two samples of each that warm up; a sample calls forward three times
    assert samples == (["fast"] * 3 + ["slow"] * 3) * 3 + ["fast"] * 6
    log.clear()
    timing.interleaved(
        {"slow": ways["slow"]}, FakeClock(), repeats=1, budget=10.0, deadline=timing.Deadline(1e9),
        guard=lambda call: (call(), None),
    )  # fmt: skip
    assert len(log) == 6, "warmed up once, as it takes 30 s"
    assert timing.repeats_for(1e-5, 30, 1.5) == 30 and timing.repeats_for(60.0, 30, 1.5) == 3
    assert timing.repeats_for(60.0, 1, 1.5) == 1


def test_what_is_prepared_is_not_timed_and_steps_are_told_one_by_one() -> None:
    timed = Timed(lambda a, b: a + b, lambda: (4.0, 8.0), count=3)
    assert timed.seconds(FakeClock()) == 4.0


def test_rates_are_measured(monkeypatch) -> None:
    monkeypatch.undo()
    rates = roofline.measure(CPU, {"fp32": torch.float32}, timing.clock_for(CPU), repeats=2)
    assert 1e7 < rates.bytes_per_second < 1e13 and 1e8 < rates.flop_per_second["fp32"] < 1e14


def test_sensors_of_a_gpu_are_read() -> None:
    assert gpu.parse_sensors("580.159.04, 1980, 2619, 41, 118.20\n") == {
        "driver": "580.159.04", "sm_clock_mhz": 1980.0, "memory_clock_mhz": 2619.0, "temperature_c": 41.0,
        "power_w": 118.2,
    }  # fmt: skip
    assert gpu.parse_sensors("580.15, 1980, 2619, 41, [N/A]")["power_w"] == "[N/A]"
    assert gpu.parse_sensors("No devices were found") is None


def test_names_tell_sizes_apart() -> None:
    made = Options(model=("tiny", "base"), dtype=("fp32", "bf16"), image_size=(224, 112), batch=(4, 8))
    names = [sizes.name for sizes in options.combinations(made, CPU)]
    assert len(set(names)) == 16 and "tiny fp32 batch 4" in names and "base bf16 batch 8 112 px" in names
    (sizes,) = options.combinations(Options(image_size=(112,), patch_size=(8,), cut=60), CPU)
    assert sizes.cut == round(60 * 197 / 197) and sizes.name == "tiny bf16 batch 8 112/8 px cut 60"


def test_the_attention_of_our_step_can_be_chosen() -> None:
    made = step.contests(Options(**SMALL, backend="reference"), CPU)
    assert made[0].name.endswith(" reference attention") and made[0].sizes["backend"] == "reference"
    assert step.contests(Options(**SMALL), CPU)[0].sizes["backend"] == "sdpa"
    with pytest.raises(ValueError, match="backend 'cuda' cannot run here"):
        step.contests(Options(**SMALL | {"backend": "cuda"}), CPU)


TIMED = {
    "step": [{"ours", "official", "official_with_masks"}],
    "ablation": [{"base", "skip_dropped_off", "recompute_cheap", "recompute_blocks"}],
    "pretrain": [{"ours", "official"}, {"ours", "ours_workers", "official"}],
    "attention": [{"ours_reference", "ours_sdpa", "ours_matmul", "sdpa_mask", "official", "official_with_masks"}],
    "tokenize": [{"workers_1", "workers_0"}],
}
"""Suite -> the ways that are timed on a CPU, of each contest."""


@pytest.mark.parametrize("suite", [*TIMED, "kernels"])
def test_suites_check_and_time_their_ways(suite: str, tmp_path: Path) -> None:
    record = small(suite, tmp_path, workers=int(suite == "pretrain"), jitter=0.4 if suite == "step" else 0.0)
    assert record["suite"] == suite and record["measured_on"] == "cpu" and record["device"] == records.cpu_name()
    assert record["state_before"]["name"].startswith("CPU") and len(record["state_after"]["load"]) == 3
    assert record["commit"] and record["versions"]["torch"] == torch.__version__ and record["stopped"] is None
    for entry in record["contests"]:
        ways = {name: row for name, row in entry["ways"].items() if row["status"] != "unavailable"}
        assert {row["status"] for row in ways.values()} == {"timed"} and entry["base"] in ways
        for name, row in ways.items():
            assert set(row["timings"]) == set(entry["phases"]) and max(row["error_share"].values()) <= 1
            assert (name == entry["base"]) is ("times_as_long" not in row)
            assert set(entry["costs"]) in (set(), set(row.get("roofline_fraction", entry["costs"])))
    entries = record["contests"]
    if suite != "kernels":
        assert [{n for n, row in e["ways"].items() if row["status"] == "timed"} for e in entries] == TIMED[suite]
    first = entries[0]["ways"]
    if suite == "step":
        assert entries[0]["name"] == "tiny fp32 batch 2 32/8 px" and entries[0]["tokens"] == 17
        assert set(first["official"]["error_share"]) == {"loss", "gradient_norm", "gradients"}
        assert first["official"]["micro_batch"] == 2 and first["official"]["images_per_second"]["step"] > 0
        assert first["official"]["memory"]["peak_bytes"] > first["official"]["memory"]["resident_bytes"] > 0
    elif suite == "pretrain":
        assert entries[0]["name"] == "tiny fp32 batch 2 32/8 px 1 workers" and entries[0]["cached_images"] == 24
        assert entries[1]["ways"]["official"]["error_share"] == {"images": 0.0, "tokens": 0.0}
    elif suite == "ablation" and not torch.cuda.is_available():
        assert first["cuda_graphs_on"] == {"status": "unavailable", "reason": "needs a CUDA device"}
        assert set(ablation.CHANGES) - set(first) == {"compile_on"} and entries[0]["speed"]["skip_dropped"] is True
    elif suite == "tokenize":
        assert sum(first["workers_0"]["shares"].values()) == pytest.approx(1, abs=1e-3)
    elif suite == "kernels":
        assert {entry["op"] for entry in entries} == set(REGISTRY)
        for entry in entries:
            spec = REGISTRY[entry["op"]]
            assert set(entry["ways"]) == {*spec.backends, *spec.gpu_backends, "plain_torch"}
            assert entry["phases"] == (["forward", "backward", "both"] if spec.differentiable else ["forward"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_step_agrees_in_half_precision(dtype: str) -> None:
    (setting,) = step.settings(Options(**(SMALL | {"dtype": (dtype,), "jitter": 0.0})), CPU)
    judge = step.Judge(dtype)
    judge(step.ours(setting, setting.config).results())
    errors = judge(step.official(setting, masks_built=False).results())
    assert max(errors.values()) <= 1, errors


def test_an_official_way_that_differs_is_not_timed(tmp_path: Path, monkeypatch) -> None:
    masks = step.batch_masks

    def off(permutations, cut, heads):  # one image sees one key too many
        content, query, is_target = masks(permutations, cut, heads)
        query = query.clone()
        query[0] = 0.0
        return content, query, is_target

    monkeypatch.setattr(step, "batch_masks", off)
    ways = small("step", tmp_path, jitter=0.0)["contests"][0]["ways"]
    assert ways["ours"]["status"] == "timed" and ways["official"]["status"] == "wrong"
    assert "times as much as is allowed" in ways["official"]["reason"] and "timings" not in ways["official"]


def test_flop_of_a_step_are_those_of_the_targets() -> None:
    """Forward and backward, per image, last block pruned: 232, 64 and 18 GFLOP."""
    for name, cut, wanted in (("base", 60, 232), ("small", 50, 64), ("tiny", 50, 18)):
        assert step.flop_per_image(ModelConfig.preset(name), cut) / 1e9 == pytest.approx(wanted, rel=0.03)


def test_a_block_leaves_out_what_workers_had_ready() -> None:
    used, asked = [], []

    def feed(steps: int):
        asked.append(steps)
        return range(steps)

    block = pretrain.timed_block(feed, lambda number, batch: used.append(number), 2, 3)
    rest = block.prepare()
    assert asked == [1 + 2 * 2 + 3] and used == list(range(5)) and block.count == 3
    block.call(*rest)
    assert used == list(range(8))


def test_an_op_unknown_to_the_suite_is_timed_at_its_costliest_shape() -> None:
    (sizes,) = options.combinations(Options(**SMALL), CPU)
    spec = replace(REGISTRY["two_stream_attention"], name="new_op")
    assert list(kernels_suite.sized_shapes(spec, sizes, CPU)) == ["vit"]


def test_a_backend_that_errs_is_not_timed() -> None:
    spec = REGISTRY["permuted_embed"]

    def off(*arguments, backend, **inputs):
        return spec.function(*arguments, backend=backend, **inputs) * 1.01

    wrong = replace(spec, function=off)
    made = kernels_suite.contest(wrong, "small", spec.shapes["small"], "fp32", CPU)
    rows = measure(made, RULES)["ways"]
    assert rows["reference"]["status"] == "wrong" and rows["plain_torch"]["status"] == "timed"
    assert "times_as_long" not in rows["plain_torch"]


def test_too_few_images_for_the_codebook(monkeypatch) -> None:
    with pytest.raises(ValueError, match="2 images have 8 different features, the codebook needs 9"):
        tokenizing.arena({"workers_0": 0}, 2, 2, 9, "fp32", CPU).__enter__()


def test_peak_memory_on_a_cpu_counts_live_tensors() -> None:
    weight = torch.zeros(1000)

    def call() -> None:
        a = torch.ones(2000)
        b = a + 1
        del a
        torch.ones(500).add_(b[:500])
        weight.add_(1)

    found = memory.peak(call, CPU, lambda: [weight])
    assert found["resident_bytes"] == 4000 and found["extra_bytes"] == 2 * 8000
    assert found["peak_bytes"] == 4000 + 2 * 8000


def test_a_change_of_the_loss_is_not_timed(monkeypatch) -> None:
    monkeypatch.setitem(ablation.CHANGES, "other_cut", ("objective", "cut", 5))
    (made,) = ablation.contests(Options(**SMALL, jitter=0.0), CPU)
    rows = measure(replace(made, ways=("base", "other_cut")), RULES)["ways"]
    assert rows["base"]["status"] == "timed" and rows["other_cut"]["status"] == "wrong"


@pytest.mark.long
def test_pytest_benchmark_times_the_same_contests(tmp_path: Path) -> None:
    """By rounds of its own; what was prepared is not in them."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-k", "permuted_embed"]
    command += [f"--benchmark-json={tmp_path / 'out.json'}"]
    sizes = "--suite kernels --batch 1 --image-size 32 --repeats 3 --dtype fp32 --device cpu"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # it is no worker
    command.append(f"--bench={sizes}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {(b["extra_info"]["way"], b["extra_info"]["phase"]) for b in found} == {
        (name, phase) for name in ("reference", "plain_torch") for phase in ("forward", "backward", "both")
    }
    for benchmark in found:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        assert stats["rounds"] == 3 and stats["median"] > 0 and info["measured_on"] == "cpu"
        assert info["machine"].startswith("CPU") and max(info["error_share"].values()) <= 1
        assert benchmark["options"]["timer"] == "device_time" and benchmark["group"].endswith(info["phase"])
    assert "skipped" in done.stdout, "a backend that is not there"


def test_pytest_refuses_what_run_refuses(capsys) -> None:
    for given, message in (("--suite steps", "takes the options of"), ("--batch 0", "--batch must be at least 1")):
        with pytest.raises(pytest.UsageError, match=message):
            conftest.chosen_options(SimpleNamespace(getoption=lambda name, given=given: given))
    assert "steps" in capsys.readouterr().err
