"""The suites at tiny sizes: what is checked, timed and recorded, by both front ends. No test asserts a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command_line
from bench import ablation, contest, kernels_suite, memory, options, pretrain, records, roofline, step, suites, timing
from bench.contest import Arena, Contest, Entrant, Rules, measure
from bench.guard import Unavailable
from bench.options import Options
from mapet.config import ModelConfig
from mapet_kernels.registry import REGISTRY

CPU = torch.device("cpu")
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
    return lambda: Entrant(contest.timed_call("run", lambda: sum(range(100))), lambda: value, **more)


def broken() -> Entrant:
    raise RuntimeError("no kernel image\nand a traceback")


def missing() -> Entrant:
    raise Unavailable("not installed")


def test_only_checked_ways_are_timed_and_compared() -> None:
    other = way(5.0, another_task="another task: sorting")
    ways = {"ours": way(1.0), "peer": way(1.05), "wrong": way(1.2), "nan": way(math.nan), "broken": broken}
    outcome = measure(fake(ways | {"missing": missing, "context": other}, images=8), RULES)
    rows = outcome.rows
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
    assert rows["ours"]["images_per_second"]["run"] > 0
    assert "times_as_long" not in rows["context"] and rows["context"]["another_task"].startswith("another task")
    assert "wrong: value errs 2 times" in "\n".join(contest.lines(outcome))


def test_no_ratio_where_ours_is_wrong() -> None:
    rows = measure(fake({"ours": way(2.0), "peer": way(1.0)}), RULES).rows
    assert rows["ours"]["status"] == "wrong" and rows["peer"]["status"] == "timed"
    assert "times_as_long" not in rows["peer"]


def test_a_time_limit_and_inputs_that_cannot_be_made() -> None:
    late = replace(RULES, deadline=timing.Deadline(0.0))
    assert measure(fake({"ours": way(1.0)}), late).rows["ours"] == {"status": "not run", "reason": "time limit"}

    @contextmanager
    def opened():
        raise MemoryError("too large")
        yield

    rows = measure(replace(fake({"ours": way(1.0)}), open=opened), RULES).rows
    assert rows["ours"] == {"status": "failed", "reason": "MemoryError: too large"}


def test_costs_give_rates_and_a_share_of_the_roofline() -> None:
    cost = roofline.Cost(1e9, 10)
    row = measure(fake({"ours": way(1.0)}, costs={"run": cost}), RULES).rows["ours"]
    seconds = row["timings"]["run"]["p50_ms"] / 1e3
    assert row["tflop_per_s"]["run"] == pytest.approx(1e9 / seconds / 1e12, rel=1e-2)
    assert row["roofline_fraction"]["run"] == pytest.approx(1e9 / 1e11 / seconds, rel=1e-2)


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


def test_run_is_the_command_that_is_meant_where_none_is_given(tmp_path: Path, monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setitem(command_line.COMMANDS, "run", (Options, asked.append))
    command_line.main(["--suite", "step", "kernels", "--model", "base", "--dtype", "bf16", "fp16", "--batch", "4"])
    assert asked[0] == Options(("step", "kernels"), ("base",), (4,), ("bf16", "fp16"))
    command_line.main([])
    assert asked[1] == Options() and asked[1].suite == options.SUITES
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("run", "ablation", "report", "attention", "compare"))


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


def test_the_step_is_measured_against_the_official_way(tmp_path: Path) -> None:
    record = small("step", tmp_path, jitter=0.4)
    assert record["suite"] == "step" and record["measured_on"] == "cpu" and record["device"] == records.cpu_name()
    assert record["state_before"]["name"].startswith("CPU") and len(record["state_after"]["load"]) == 3
    assert record["commit"] and record["versions"]["torch"] == torch.__version__ and record["stopped"] is None
    (entry,) = record["contests"]
    assert entry["name"] == "tiny fp32 batch 2 32/8 px" and entry["tokens"] == 17 and entry["jitter"] == 0.4
    ways = entry["ways"]
    assert list(ways) == ["ours", "official", "official_with_masks"]
    assert {row["status"] for row in ways.values()} == {"timed"}
    for row in ways.values():
        assert row["micro_batch"] == 2 and row["images_per_second"]["step"] > 0
        assert row["memory"]["peak_bytes"] > row["memory"]["resident_bytes"] > 0
        assert "counted on a CPU" in row["memory"]["how"]
    for name in ("official", "official_with_masks"):
        assert set(ways[name]["error_share"]) == {"loss", "gradient_norm", "gradients"}
        assert max(ways[name]["error_share"].values()) <= 1 and ways[name]["times_as_long"]["step"] > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_step_agrees_in_half_precision(dtype: str) -> None:
    (sizes,) = options.combinations(Options(**(SMALL | {"dtype": (dtype,)})), CPU)
    setting = step.Setting(sizes, CPU, 0.0)
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


def test_pretraining_with_data_end_to_end(tmp_path: Path) -> None:
    record = small("pretrain", tmp_path, workers=1)
    training, loading = record["contests"]
    assert training["name"] == "tiny fp32 batch 2 32/8 px 1 workers" and training["cached_images"] == 24
    assert {name: row["status"] for name, row in training["ways"].items()} == {"ours": "timed", "official": "timed"}
    errors = training["ways"]["official"]["error_share"]
    assert set(errors) == {"loss", "gradient_norm", "gradients"} and max(errors.values()) <= 1
    assert loading["wanted_images_per_second"] == 20_000 and loading["batch"] == 24
    assert {name: row["status"] for name, row in loading["ways"].items()} == {
        "ours": "timed", "ours_workers": "timed", "official": "timed",
    }  # fmt: skip
    assert loading["ways"]["official"]["error_share"] == {"images": 0.0, "tokens": 0.0}
    assert loading["ways"]["ours"]["images_per_second"]["batch"] > 0


def test_a_block_leaves_out_what_workers_had_ready() -> None:
    used, asked = [], []

    def feed(steps: int):
        asked.append(steps)
        return range(steps)

    sample = pretrain.block_sample("step", feed, lambda number, batch: used.append(number), 2, 3, CPU)
    assert set(sample(timing.CpuClock())) == {"step"}
    assert asked == [1 + 2 * 2 + 3] and used == list(range(8))


def test_every_op_is_measured_in_both_directions(tmp_path: Path) -> None:
    record = small("kernels", tmp_path)
    entries = record["contests"]
    assert {entry["op"] for entry in entries} == set(REGISTRY)
    for entry in entries:
        statuses = {name: row["status"] for name, row in entry["ways"].items()}
        assert set(statuses) == {*REGISTRY[entry["op"]].backends, *REGISTRY[entry["op"]].gpu_backends, "plain_torch"}
        assert set(statuses.values()) <= {"timed", "unavailable"}, entry["ways"]
        assert statuses[entry["base"]] == "timed"
        phases = {"forward", "backward", "both"} if REGISTRY[entry["op"]].differentiable else {"forward"}
        for row in entry["ways"].values():
            if row["status"] == "timed":
                assert set(row["timings"]) == set(row["roofline_fraction"]) == phases
                assert max(row["error_share"].values()) <= 1


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
    rows = measure(made, RULES).rows
    assert rows["reference"]["status"] == "wrong" and rows["plain_torch"]["status"] == "timed"
    assert "times_as_long" not in rows["plain_torch"]


@pytest.mark.parametrize("suite", ["peers", "kmeans", "tokenize"])
def test_the_other_suites(suite: str, tmp_path: Path, monkeypatch) -> None:
    from bench import kmeans_contest

    monkeypatch.setitem(kmeans_contest.SIZES, "cpu", ((8, 16, 200),))
    monkeypatch.setattr(contest.memory, "peak", lambda *_: None)
    for entry in small(suite, tmp_path)["contests"]:
        statuses = {row["status"] for row in entry["ways"].values()}
        assert statuses <= {"timed", "unavailable"} and entry["ways"][entry["base"]]["status"] == "timed", entry
        if "timm_vit" in entry["ways"]:
            row = entry["ways"]["timm_vit"]
            assert row["another_task"].startswith("another task") and "times_as_long" not in row
        if suite == "tokenize":
            assert all(row["images_per_second"]["files_to_cache"] > 0 for row in entry["ways"].values())


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


SWITCHES = ablation.Ablation(
    batch=2, dtype="fp32", device="cpu", image_size=32, patch_size=8, compile=False, workers=0, repeats=2, seconds=0.01
)


def test_ablation_times_each_switch_against_the_base(tmp_path: Path, capsys) -> None:
    only = ("prune_last_block", "cuda_graphs", "device_jitter", "recompute")
    path = ablation.run(replace(SWITCHES, only=only, output=tmp_path))
    record = json.loads(path.read_text())
    steps, data = record["contests"]
    assert list(steps["ways"]) == [
        "base", "prune_last_block_off", "cuda_graphs_on", "recompute_cheap", "recompute_blocks",
    ]  # fmt: skip
    assert steps["speed"]["prune_last_block"] is True and list(data["ways"]) == ["base", "device_jitter_off"]
    if not torch.cuda.is_available():
        assert steps["ways"]["cuda_graphs_on"] == {"status": "unavailable", "reason": "needs a CUDA device"}
    for name in ("prune_last_block_off", "recompute_cheap", "recompute_blocks"):
        row = steps["ways"][name]
        assert row["status"] == "timed" and row["memory"]["peak_bytes"] > 0
        assert max(row["error_share"].values()) <= 1 and row["times_as_long"]["step"] > 0
    said = capsys.readouterr().out
    assert "| `prune_last_block` | on |" in said and "- `cuda_graphs_on`: unavailable" in said


def test_a_switch_that_changes_the_loss_is_not_timed(monkeypatch) -> None:
    class Cut(ablation.Switch):
        def apply(self, config):
            return replace(config, objective=replace(config.objective, cut=config.objective.cut + 1))

    (sizes,) = options.combinations(Options(**SMALL), CPU)
    setting = step.Setting(sizes, CPU, 0.0)
    (made,) = ablation.contests(setting, [Cut("other_cut_off", "other_cut", "off")], 0)
    rows = measure(made, RULES).rows
    assert rows["base"]["status"] == "timed" and rows["other_cut_off"]["status"] == "wrong"
    assert ablation.gains(measured_entry(rows)) == []


def measured_entry(rows: dict) -> dict:
    return {"ways": rows}


def test_gains_are_sorted_and_turned_the_right_way() -> None:
    def row(milliseconds: float, peak: int) -> dict:
        timing_ = {"p20_ms": milliseconds, "p50_ms": milliseconds, "p80_ms": milliseconds, "noise": 0.01, "repeats": 3}
        return {"status": "timed", "timings": {"step": timing_}, "memory": {"peak_bytes": peak}}

    rows = {
        "base": row(100.0, 2**21), "fused_off": row(110.0, 2**21), "compile_on": row(80.0, 2**20),
        "slow_off": row(90.0, 2**21), "fp8_on": {"status": "unavailable", "reason": "no torchao"},
    }  # fmt: skip
    found = ablation.gains({"ways": rows})
    assert [(g.switch, g.base, round(g.gain, 3)) for g in found] == [
        ("compile", "off", 0.25), ("fused", "on", 0.1), ("slow", "on", -0.1),
    ]  # fmt: skip
    lines = ablation.as_markdown([{"ways": rows}])
    assert lines[2] == "| `compile` | off | 100.0 | 80.0 | +25.0 % | 1 % | -1 MiB |"
    assert lines[-1] == "- `fp8_on`: unavailable, no torchao"
    assert ablation.as_markdown([{"ways": {"base": {"status": "failed", "reason": "x"}}}])[0] == "No switch was timed."


def test_switches_are_those_of_the_configuration() -> None:
    names = [switch.name for switch in ablation.switches(ablation.Ablation())]
    assert names[0] == "joint_streams_off" and names[-2:] == ["recompute_cheap", "recompute_blocks"]
    assert {"compile_on", "cuda_graphs_on", "fp8_on"} < set(names)
    assert "compile_on" not in [switch.name for switch in ablation.switches(ablation.Ablation(compile=False))]
    with pytest.raises(ValueError, match="unknown switches nothing; they are chunked_head, compile"):
        ablation.switches(ablation.Ablation(only=("nothing",)))


@pytest.mark.long
def test_pytest_runs_the_same_contests(tmp_path: Path) -> None:
    """pytest-benchmark's statistics are made of our durations, with our quantiles beside them."""
    done = bench_pytest(
        tmp_path, "--suite", "kernels", "--batch", "1", "--image-size", "32", "--patch-size", "16", "--repeats", "3",
        "--dtype", "fp32", "--device", "cpu", "-k", "permuted_embed",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {(b["extra_info"]["way"], b["extra_info"]["phase"]) for b in found} == {
        (name, phase) for name in ("reference", "plain_torch") for phase in ("forward", "backward", "both")
    }
    for benchmark in found:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        assert stats["rounds"] == info["repeats"] == 3 and info["measured_on"] == "cpu"
        assert info["machine"].startswith("CPU") and info["p20_ms"] <= info["p50_ms"] <= info["p80_ms"]
        assert stats["median"] * 1e3 == pytest.approx(info["p50_ms"], abs=1e-3)
        assert max(info["error_share"].values()) <= 1 and benchmark["options"]["timer"] == "playback"
    assert "skipped" in done.stdout, "a backend that is not there"


@pytest.mark.long
def test_pytest_refuses_unknown_suites(tmp_path: Path) -> None:
    done = bench_pytest(tmp_path, "--suite", "steps", "--device", "cpu")
    assert done.returncode != 0 and "--suite takes kernels, step, pretrain" in done.stdout + done.stderr


def bench_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", *arguments]
    command += [f"--benchmark-json={folder / 'out.json'}"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # it is no worker
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, check=False)
