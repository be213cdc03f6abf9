"""The attention suite on a CPU with tiny shapes: what it times and records, when it stops, its picture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from bench import attention, attention_ways, equal_results, gpu, plot, records, roofline, timing
from bench.attention import AttentionBenchmark, Configuration
from bench.attention_ways import FlexSetting, Unavailable, flex, ours, random_operands
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.visibility import two_stream_visibility

CPU = torch.device("cpu")
SHAPE = TwoStreamShape(13, 4, batch=3, heads=2, size=16)
FAST = AttentionBenchmark(preset="quick", device="cpu", batch_heads=1, heads=1, dtype="fp32", repeats=2)


def few(options: AttentionBenchmark) -> list[Configuration]:
    """A plan of tiny shapes, one of each kind that draws something."""
    return [
        Configuration("target", SHAPE, "fp32", "all"),
        Configuration("order", SHAPE, "fp32", "order"),
        Configuration("tokens", replace(SHAPE, tokens=29, cuts=9), "fp32"),
        Configuration("cut", replace(SHAPE, cuts=9), "fp32"),
    ]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AttentionBenchmark:
    """Options of a run over `few`, with rates that need no measuring."""
    monkeypatch.setattr(attention, "plan", few)
    monkeypatch.setattr(roofline, "measure", lambda *_: roofline.Rates(1e10, {"fp32": 1e11}))
    return replace(FAST, output=tmp_path)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_records_every_way_and_draws_a_picture(tiny: AttentionBenchmark, capsys) -> None:
    path = attention.run(tiny)
    record = read(path)
    assert record["suite"] == "attention" and record["measured_on"] == "cpu" and record["stopped"] is None
    assert record["commit"] and record["versions"]["torch"] == torch.__version__
    assert record["state_before"]["name"].startswith("CPU") and record["rates"]["bytes_per_second"] == 1e10
    assert [c["label"] for c in record["configurations"]] == ["target", "order", "tokens", "cut"]
    target = record["configurations"][0]
    assert {name for name, row in target["ways"].items() if row["status"] == "timed"} >= {
        "ours_reference", "ours_sdpa", "sdpa_mask", "official", "official_with_masks",
    }  # fmt: skip
    row = target["ways"]["ours_sdpa"]
    for phase in timing.PHASES:
        quantiles = row["timings"][phase]
        assert 0 < quantiles["p20_ms"] <= quantiles["p50_ms"] <= quantiles["p80_ms"] and quantiles["repeats"] == 2
        seconds = quantiles["p50_ms"] / 1e3
        cost = target["costs"][phase]
        assert row["tflop_per_s"][phase] == pytest.approx(cost["flop"] / seconds / 1e12, abs=1e-6)
        assert row["gbyte_per_s"][phase] == pytest.approx(cost["bytes"] / seconds / 1e9, abs=1e-3)
        bound = target["roofline_ms"][phase] / 1e3
        assert row["roofline_fraction"][phase] == pytest.approx(bound / seconds, rel=0.05, abs=1e-4)
    assert set(row["error_share"]) == set(equal_results.RESULTS) and max(row["error_share"].values()) <= 1
    missing = target["ways"]["ours_triton"]
    assert missing == {"status": "unavailable", "reason": missing["reason"]} and "CUDA" in missing["reason"]
    assert target["ways"]["flex_one_call_128"]["status"] == "unavailable"
    assert set(record["configurations"][1]["ways"]) >= {"ours_sdpa_unpacked", "ours_sdpa_image_order"}
    assert f"record: {path}" in capsys.readouterr().out
    picture = imread(path.with_suffix(".png"))
    assert picture.shape[0] > 800 and picture[..., :3].std() > 0.05
    assert sorted(p.name for p in tiny.output.iterdir()) == [path.name, path.with_suffix(".png").name]


def test_wrong_and_broken_ways_are_listed_and_never_timed(tiny: AttentionBenchmark, monkeypatch, capsys) -> None:
    def wrong(operands):
        way = ours("sdpa", operands)
        collect = way.collect

        def off(outputs, gradients):  # one gradient is wrong by one part in a hundred, in one image
            results = list(collect(outputs, gradients))
            results[4] = results[4].clone()
            results[4][0] *= 1.01
            return tuple(results)

        return replace(way, collect=off)

    def blind(operands):
        way = ours("sdpa", operands)
        return replace(way, collect=lambda *parts: tuple(x * float("nan") for x in way.collect(*parts)))

    def broken(operands):
        raise RuntimeError("no kernel image\nand a traceback")

    def hungry(operands):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    added = {"wrong": wrong, "blind": blind, "broken": broken, "hungry": hungry}
    known = attention.builders()
    monkeypatch.setattr(attention, "builders", lambda: {**known, **added})
    monkeypatch.setattr(attention, "way_names", lambda *_: ["wrong", "blind", "broken", "hungry", "ours_sdpa"])
    monkeypatch.setattr(attention, "plan", lambda options: few(options)[:1])
    rows = read(attention.run(replace(tiny, plot=False)))["configurations"][0]["ways"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "wrong": "wrong", "blind": "wrong", "broken": "failed", "hungry": "failed", "ours_sdpa": "timed",
    }  # fmt: skip
    assert rows["wrong"]["reason"].startswith("dk errs ") and rows["wrong"]["error_share"]["dv"] <= 1
    assert rows["broken"]["reason"] == "RuntimeError: no kernel image"
    assert rows["hungry"]["reason"].startswith("OutOfMemoryError: CUDA out of memory")
    assert all("timings" not in rows[name] for name in added)
    assert "wrong: dk errs" in capsys.readouterr().out


def test_a_way_that_breaks_while_timed_is_dropped(tiny: AttentionBenchmark, monkeypatch) -> None:
    calls = []

    def tiring(operands):
        way = ours("sdpa", operands)

        def attend(*leaves):
            calls.append(0)
            if len(calls) > 3:
                raise RuntimeError("worn out")
            return way.attend(*leaves)

        return replace(way, attend=attend)

    known = attention.builders()
    monkeypatch.setattr(attention, "builders", lambda: {**known, "tiring": tiring})
    monkeypatch.setattr(attention, "way_names", lambda *_: ["tiring", "ours_sdpa"])
    monkeypatch.setattr(attention, "plan", lambda options: few(options)[:1])
    rows = read(attention.run(replace(tiny, plot=False)))["configurations"][0]["ways"]
    assert rows["tiring"]["status"] == "failed" and rows["tiring"]["reason"] == "RuntimeError: worn out"
    assert rows["ours_sdpa"]["timings"]["both"]["repeats"] == 2


def test_a_time_limit_stops_with_what_there_is(tiny: AttentionBenchmark, monkeypatch) -> None:
    """The limit passes inside the second configuration: its remaining ways are not run, the third is not begun."""
    measured = []
    monkeypatch.setattr(timing.Deadline, "passed", lambda _: len(measured) > 4)
    known = attention.builders()
    counted = {name: lambda operands, b=b: (measured.append(0), b(operands))[1] for name, b in known.items()}
    monkeypatch.setattr(attention, "builders", lambda: counted)
    monkeypatch.setattr(attention, "way_names", lambda *_: ["ours_reference", "ours_sdpa", "sdpa_mask"])
    record = read(attention.run(replace(tiny, plot=False)))
    first, second = record["configurations"]
    assert all(row["status"] == "timed" for row in first["ways"].values())
    assert second["ways"]["sdpa_mask"] == {"status": "not run", "reason": "time limit"}
    assert record["stopped"].startswith("time limit") and "2 of 4" in record["stopped"]


def test_sigterm_keeps_finished_configurations(tiny: AttentionBenchmark, monkeypatch) -> None:
    real = attention.measure

    def interrupted(configuration, measurement):
        if configuration.label == "order":
            signal.raise_signal(signal.SIGTERM)
        return real(configuration, measurement)

    monkeypatch.setattr(attention, "measure", interrupted)
    record = read(attention.run(tiny))
    assert record["stopped"] == "interrupted after 1 of 4 configurations"
    assert [c["label"] for c in record["configurations"]] == ["target"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_draft_survives_a_kill_and_a_record_is_never_overwritten(tmp_path: Path) -> None:
    draft = records.Draft("attention", "x", tmp_path)
    draft.write({"configurations": [1]})
    draft.write({"configurations": [1, 2]})
    assert read(draft.partial)["configurations"] == [1, 2] and not draft.path.exists()
    draft.path.write_text("older")
    with pytest.raises(FileExistsError):
        draft.finish()
    assert draft.path.read_text() == "older"


@pytest.mark.parametrize("name", ["ours_sdpa_image_order", "ours_reference_unpacked", "sdpa_mask", "official"])
def test_ways_in_other_layouts_give_the_results_of_the_reference(name: str) -> None:
    operands = random_operands(SHAPE, torch.float32, CPU)
    errors = equal_results.yardstick(operands).errors(attention_ways.builders()[name](operands).results())
    assert max(errors.values()) <= 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("block", [128, 64])
def test_flex_attention_has_the_same_outputs(block: int, one_call: bool) -> None:
    """Not compiled: compiled it has no backward pass on a CPU. On a GPU the suite checks its gradients too."""
    operands = random_operands(SHAPE, torch.float32, CPU)
    way = flex(FlexSetting(block, one_call, compiled=False), operands)
    with torch.no_grad():
        outputs = way.attend(*(x.detach() for x in way.leaves))
    back = way.collect(outputs, tuple(torch.zeros_like(x) for x in way.leaves))
    for actual, exact in zip(back[:2], equal_results.yardstick(operands).exact[:2], strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    for gradient, leaf in zip(back[2:], (operands.q_content, operands.q_query, operands.k, operands.v), strict=True):
        assert gradient.shape == leaf.shape
    with pytest.raises(Unavailable, match="no backward pass on a CPU"):
        flex(FlexSetting(block, one_call), operands)


def test_tiles_of_flex_attention_divide_its_blocks() -> None:
    options = FlexSetting(64).kernel_options
    assert all(64 % tile == 0 for tile in options.values())
    assert options["BLOCK_N1"] % options["BLOCK_M1"] == 0 and options["BLOCK_M2"] % options["BLOCK_N2"] == 0
    assert FlexSetting(128).kernel_options is None


def test_the_yardstick_is_the_same_in_chunks(monkeypatch) -> None:
    operands = random_operands(SHAPE, torch.float16, CPU)
    whole = equal_results.yardstick(operands)
    monkeypatch.setitem(equal_results.CHUNK_BYTES, "cpu", 1)
    assert equal_results.images_per_chunk(SHAPE, 1) == 1
    chunked = equal_results.yardstick(operands)
    for a, b in zip(whole.exact, chunked.exact, strict=True):
        torch.testing.assert_close(a, b)
    assert whole.allowed == pytest.approx(chunked.allowed, rel=1e-3)


@pytest.mark.parametrize("shape", [SHAPE, TwoStreamShape(17, 16, 1, 3, 8), TwoStreamShape(9, 1, 2, 1, 4)])
def test_costs_equal_what_masks_and_tensors_count(shape: TwoStreamShape) -> None:
    pairs = sum(int(mask.sum()) for mask in two_stream_visibility(shape.tokens, shape.cuts))
    pairs *= shape.batch * shape.heads
    assert roofline.visible_pairs(shape) == pairs
    operands = random_operands(shape, torch.float16, CPU)

    def size(*tensors: torch.Tensor) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    q = size(operands.q_content, operands.q_query)
    kv = size(operands.k, operands.v)
    lse = 4 * (operands.q_content.shape[1] + operands.q_query.shape[1]) * shape.batch * shape.heads
    costs = roofline.costs(shape, torch.float16)
    assert costs["forward"] == roofline.Cost(4 * pairs * shape.size, q + kv + q)
    assert costs["backward"].flop == 10 * pairs * shape.size
    assert costs["backward"].bytes == (q + q + q + kv + lse) + (q + kv)  # q, out, d_out, k, v, lse; then dq, dk, dv
    assert costs["both"].bytes == costs["forward"].bytes + costs["backward"].bytes
    rates = roofline.Rates(1e9, {"fp16": 1e30})
    bounds = roofline.bounds(costs, rates, "fp16")
    assert bounds["both"] == pytest.approx(costs["both"].bytes / 1e9)
    rates = roofline.Rates(1e30, {"fp16": 1e9})
    assert roofline.bounds(costs, rates, "fp16")["backward"] == pytest.approx(costs["backward"].flop / 1e9)


def test_rates_are_measured() -> None:
    rates = roofline.measure(CPU, {"fp32": torch.float32}, timing.clock_for(CPU), repeats=2)
    assert 1e7 < rates.bytes_per_second < 1e13 and 1e8 < rates.flop_per_second["fp32"] < 1e14


class Ticking:
    """A way of known durations on a clock that only it moves."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def forward(self):
        self.log.append(self.name)
        return self.seconds

    def backward(self, outputs):
        return outputs


class FakeClock:
    def time(self, call):
        return (result := call()), result


def test_ways_are_timed_in_turn_and_slow_ones_less_often() -> None:
    log: list[str] = []
    ways = {"fast": Ticking("fast", 0.1, log), "slow": Ticking("slow", 10.0, log)}
    seconds, reasons = timing.interleaved(
        ways,
        FakeClock(),
        repeats=5,
        budget=100.0,
        deadline=timing.Deadline(1e9),
        guard=lambda call: (call(), None),
    )
    assert not reasons and len(seconds["fast"]["both"]) == 5 and len(seconds["slow"]["forward"]) == 3
    samples = log[8:]  # after two samples of each that warm up; a sample calls forward twice
    assert samples == ["fast", "fast", "slow", "slow"] * 3 + ["fast", "fast"] * 2
    log.clear()
    assert sum(timing.warmed_up(ways["slow"], FakeClock(), budget=10.0).values()) == 30.0 and log == ["slow", "slow"]
    assert timing.repeats_for(1e-5, 30, 1.5) == 30 and timing.repeats_for(60.0, 30, 1.5) == 3
    assert timing.repeats_for(60.0, 1, 1.5) == 1


def test_a_deadline_passes_when_its_seconds_are_over() -> None:
    now = [5.0]
    deadline = timing.Deadline(2.0, lambda: now[0])
    assert not deadline.passed() and deadline.left() == 2.0
    plan = attention.plan(AttentionBenchmark())
    assert not attention.no_time_for(plan[0], deadline) and attention.no_time_for(plan[-1], deadline)
    assert not attention.no_time_for(plan[-1], timing.Deadline(attention.AUTOTUNE_SECONDS, lambda: 0.0))
    now[0] = 7.0
    assert deadline.passed()


def test_plans_hold_the_rows_of_the_targets() -> None:
    plan = attention.plan(AttentionBenchmark())
    first = plan[0].shape
    assert (first.tokens, first.cuts, first.batch * first.heads, first.size) == (197, 50, 3072, 64)
    assert plan[0].ways == "all" and plan[1].ways == "order"
    lengths = {c.shape.tokens: c.shape for c in plan if c.label in ("target", "tokens")}
    assert set(lengths) == {50, 197, 344, 785, 1025}
    total = 3072 / 12 * 197
    assert all(abs(s.batch * s.tokens / total - 1) < 0.02 for s in lengths.values())
    cuts = sorted(c.shape.cuts / 197 for c in plan if c.label == "cut")
    assert cuts[0] == pytest.approx(0.1, abs=0.003) and cuts[-1] == pytest.approx(0.9, abs=0.003)
    assert {c.shape.heads for c in plan} == {3, 6, 12}
    assert {c.shape.batch * c.shape.heads for c in plan if c.label == "heads"} == {3072}
    assert {c.dtype for c in plan} == {"bf16", "fp16"}
    everything = attention.plan(AttentionBenchmark(preset="full"))
    assert len({(c.shape, c.dtype) for c in everything[2:]}) == len(everything) - 2 == 300
    tuned = {"flex_one_call_128_autotuned", "flex_two_calls_128_autotuned"}
    assert tuned < set(attention.way_names(plan[-1], "flex_two_calls_64"))
    assert attention.plan(AttentionBenchmark(preset="tuned_flex")) == [plan[-1]]
    assert "flex_two_calls_64" in attention.way_names(plan[2], "flex_two_calls_64")
    for configuration in plan:
        assert set(attention.way_names(configuration, "flex_one_call_128")) <= set(attention.builders())


def test_the_best_setting_of_flex_attention_is_the_fastest_timed_one() -> None:
    def row(status: str, both: float) -> dict:
        return {"status": status, "timings": {"both": {"p50_ms": both}}}

    rows = {
        "flex_one_call_128": row("timed", 2.0),
        "flex_two_calls_64": row("timed", 1.5),
        "flex_one_call_64": row("wrong", 0.1),
        "ours_sdpa": row("timed", 0.5),
    }
    assert attention.best_flex(rows, "flex_one_call_128") == "flex_two_calls_64"
    assert attention.best_flex({}, "flex_one_call_128") == "flex_one_call_128"


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="unknown ways warp; ways are ours_reference"):
        attention.chosen_device(replace(FAST, ways=("warp",)))
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        attention.chosen_device(replace(FAST, device="meta"))
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        attention.chosen_device(replace(FAST, repeats=0))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no CUDA device here; use --device cpu"):
            attention.chosen_device(replace(FAST, device="cuda"))


def test_only_attention_records_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"suite": "step"}')
    with pytest.raises(ValueError, match=r"other\.json is no record of `python -m bench attention`"):
        plot.draw(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"other\.json is no record"):
        plot.draw(path)
    with pytest.raises(ValueError, match="needs the paths of records"):
        plot.run(plot.Plot(()))
    path.write_text('{"suite": "attention", "configurations": [], "best_flex": ""}')
    with pytest.raises(ValueError, match="no way was timed in any configuration"):
        plot.draw(path)


def test_without_tyro_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('No module named tyro', name='tyro')")
    command = [sys.executable, "-m", "bench", "attention"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    root = Path(__file__).parent.parent
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert result.returncode == 1
    assert "needs the package tyro: pip install tyro" in result.stderr and "CONTRIBUTING.md" in result.stderr


def test_the_picture_compares_with_every_setting_of_flex_attention() -> None:
    """The best one where all were timed; with tuned tiles against ours in the same configuration."""

    def configuration(label: str, **both: float) -> dict:
        rows = {n: {"status": "timed", "timings": {p: {"p50_ms": t} for p in timing.PHASES}} for n, t in both.items()}
        return {"label": label, "ways": rows}

    target = configuration("target", ours_sdpa=4.0, ours_triton=2.0, flex_one_call_128=5.0, flex_one_call_64=6.0)
    tuned = configuration(
        "autotuned", ours_triton=1.0, flex_one_call_128_autotuned=2.0, flex_two_calls_128_autotuned=3.0
    )
    record = {"best_flex": "flex_one_call_128", "configurations": [target, tuned]}
    assert list(plot.shown(record, target)) == ["ours_triton", "ours_sdpa", "flex"]
    assert plot.times_as_long(record, target, "ours_triton", "both") == {"flex": 2.5, "flex_tuned": 2.0}
    record["configurations"] = [target]
    assert plot.times_as_long(record, target, "ours_triton", "both") == {"flex": 2.5}
    assert plot.times_as_long({**record, "configurations": [tuned]}, tuned, "ours_triton", "both") == {
        "flex_tuned": 2.0
    }


def test_sensors_of_a_gpu_are_read() -> None:
    assert gpu.parse_sensors("580.159.04, 1980, 2619, 41, 118.20\n") == {
        "driver": "580.159.04",
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 2619.0,
        "temperature_c": 41.0,
        "power_w": 118.2,
    }
    assert gpu.parse_sensors("580.15, 1980, 2619, 41, [N/A]")["power_w"] == "[N/A]"
    assert gpu.parse_sensors("No devices were found") is None


def test_memory_is_counted_beyond_inputs_and_outputs(monkeypatch) -> None:
    """With an allocator that is told what to say: the peaks, and what stays after the forward pass besides outputs."""
    allocated, peaks = iter([1000, 1900]), iter([3000, 4500])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    way = attention_ways.Way((), lambda: (torch.zeros(100),), (), lambda *_: ())
    monkeypatch.setattr(attention_ways.Way, "backward", lambda *_: ())
    assert attention.memory(way, torch.device("cuda")) == {
        "forward_peak_bytes": 2000,
        "saved_bytes": 500,
        "backward_peak_bytes": 3500,
    }
    assert attention.memory(way, CPU) is None
