"""The page and the records of a harvest, from synthetic ones: whole, partial, damaged, and of nothing."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import harvest_data, harvest_floors, report_data
from bench.harvest_advice import advice, counted, winners
from bench.harvest_data import Config, Refused, Shape, read
from bench.harvest_floors import Floors
from bench.harvest_report import RESULTS, figure, label, page, records, report, stamp
from bench.harvesting.parts import best_configurations

ROOT = Path(__file__).parent.parent
TARGET = Shape(256, 12, 197, 50, 64)
PAIRS = 297_145_344
"""3072 images x heads, 491 rows of 197 keys each: the 297.1 million visible pairs of the target."""
TODAY, OTHER = Config(128, 64, 8, 2), Config(64, 64, 4, 3)
SMALL_CONFIG = Config(32, 128, 8, 2)


def time_row(op: str, way: str, ms: float, shape: Shape = TARGET, config: Config | None = None, **more) -> dict:
    return {
        "part": "attention", "kind": "time", "op": op, "way": way, "dtype": "bf16", "shape": shape._asdict(),
        "config": None if config is None else config._asdict(), "default": True,
        "p20_ms": round(0.99 * ms, 6), "p50_ms": ms, "p80_ms": round(1.01 * ms, 6), "noise": 0.02,
        "repeats": 20, **more,
    }  # fmt: skip


def other_length(tokens: int, cut: int) -> Shape:
    return Shape(round(256 * 197 / tokens), 12, tokens, cut, 64)


def attention_rows() -> list[dict]:
    """Forward 0.38 ms, backward 1.5 ms; peers at 2.5, 6 and 12 times (backward: FlexAttention at 2 times)."""
    rows = [time_row("forward", "ours", 0.4, config=TODAY, repeats=3)]  # a short first round, replaced by:
    rows += [time_row("forward", "ours", 0.38, config=TODAY), time_row("backward", "ours", 1.5)]
    rows += [time_row("dq", "ours", 0.6, config=TODAY), time_row("dkdv", "ours", 0.9, config=SMALL_CONFIG)]
    rows += [time_row("forward", way, 0.38 * x) for way, x in (("flex", 2.5), ("sdpa_mask", 6), ("official", 12))]
    rows += [time_row("backward", "flex", 3.0)]
    for tokens, cut, slower in ((50, 13, 1.2), (1025, 260, 1.0)):
        shape = other_length(tokens, cut)
        ms = 0.38 * slower * shape.visible_pairs / PAIRS
        rows += [time_row("forward", "ours", ms, shape, TODAY)]
    return rows


def configuration_rows() -> list[dict]:
    """Another forward configuration is a fourth faster; one of dQ is faster within the noise; dK/dV stays."""
    timed = (("forward", TODAY, 0.375), ("forward", OTHER, 0.3), ("dq", TODAY, 0.6), ("dq", OTHER, 0.595),
             ("dkdv", SMALL_CONFIG, 0.9), ("dkdv", OTHER, 1.1))  # fmt: skip
    return [
        time_row(op, "ours", ms, config=config, part="configurations", default=config in (TODAY, SMALL_CONFIG))
        for op, config, ms in timed
    ]


def step_rows() -> list[dict]:
    speeds = (
        ("base", "ours", "eager", 1500.0), ("base", "ours", "eager_skip_dropped", 1400.0),
        ("base", "ours", "compiled", 2000.0), ("base", "official", "eager", 310.0),
        ("small", "ours", "eager", 3000.0), ("small", "official", "eager", 1000.0),
    )  # fmt: skip
    batch = {"base": 128, "small": 256}
    rows = []
    for model, way, mode, speed in speeds:
        ms = 1e3 * batch[model] / speed
        rows.append({
            "part": f"step_{model}", "kind": "step", "model": model, "batch": batch[model], "dtype": "bf16",
            "mode": mode, "way": way, "images_per_s": speed, "p20_ms": 0.99 * ms, "p50_ms": ms, "p80_ms": 1.01 * ms,
            "noise": 0.02, "repeats": 12, "peak_bytes": 8 << 30,
        })  # fmt: skip
    return rows


def other_rows() -> dict[str, list[dict]]:
    """By part."""
    kmeans = {
        "part": "kmeans", "kind": "kmeans", "dtype": "fp16",
        "shape": {"features": 4096, "clusters": 8192, "rows": 65536},
        "p20_ms": 6.9, "p50_ms": 7.0, "p80_ms": 7.1, "noise": 0.03, "repeats": 20, "equal_ids": 1.0,
    }  # fmt: skip
    memory = {"part": "memory", "kind": "memory", "model": "base", "fits": True, "reason": None}
    check = {"part": "check", "kind": "check", "dtype": "bf16", "allowed": 2e-3}
    metrics = {
        "sm__inst_issued.avg.pct_of_peak_sustained_active": 81.0,
        "lts__throughput.avg.pct_of_peak_sustained_elapsed": 40.0,
        "sm__warps_active.avg.pct_of_peak_sustained_active": 24.0,
        "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": 3.0,
        "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": 1.0,
        "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": 1.0,
    }
    return {
        "machine": [
            {"part": "machine", "kind": "machine", "device": "NVIDIA H200", "cores": 16, "versions": {}},
            {"part": "machine", "kind": "ceiling", "name": "copy_bytes_per_s", "value": 4.2e12},
            {"part": "machine", "kind": "ceiling", "name": "matmul_bf16_flops_per_s", "value": 7.5e14},
            {"part": "machine", "kind": "ceiling", "name": "matmul_bf16_flops_per_s", "value": 8e14},
        ],
        "check": [
            {**check, "what": "attention plain out_query", "error": 1e-3, "ok": True},
            {**check, "what": "k-means exact ids", "dtype": "fp16", "error": 1e-9, "ok": True},
        ],
        "counters": [{"part": "counters", "kind": "counters", "kernel": "forward_kernel", "metrics": metrics}],
        "kmeans": [
            {**kmeans, "way": "exact", "flops_per_s": 6.2e14, "extra_bytes": 64 << 20},
            {**kmeans, "way": "fast", "flops_per_s": 5.8e14, "extra_bytes": 1 << 20},
        ],
        "memory": [
            {**memory, "micro_batch": 96, "recompute": "none", "planned_bytes": 14 << 30, "peak_bytes": 15 << 30},
            {**memory, "micro_batch": 128, "recompute": "cheap", "planned_bytes": 12 << 30, "peak_bytes": 15 << 30},
            {**memory, "micro_batch": 512, "recompute": "blocks", "planned_bytes": 12 << 30, "peak_bytes": None,
             "fits": False, "reason": "CUDA out of memory"},
        ],
    }  # fmt: skip


def all_rows() -> dict[str, list[dict]]:
    parts = {"attention": attention_rows(), "configurations": configuration_rows(), "step": step_rows()}
    return parts | other_rows()


def outcome(status: str = "ok", **more) -> dict:
    return {
        "status": status, "seconds": 9.6, "limit": 15.0, "returncode": 0, "reason": None, "traceback": None,
        "log_tail": "", **more,
    }  # fmt: skip


def keep(folder: Path, rows: dict[str, list[dict]], outcomes: dict[str, dict] | None = None, **more) -> Path:
    (folder / "parts").mkdir(parents=True)
    for part, lines in rows.items():
        (folder / "parts" / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "started": "2026-12-01T10:20:30+00:00", "commit": "c0ffee", "device": "NVIDIA H200", "minutes": 6.0,
        "versions": {"torch": "2.11.0+cu130", "triton": "3.6.0"}, "dry_run": False,
        "parts": outcomes if outcomes is not None else {part: outcome() for part in rows}, **more,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def floors(op: str, config: Config, shape: Shape, dtype: str) -> Floors | None:
    """Of today's forward configuration at the target alone."""
    if (op, config, shape, dtype) != ("forward", TODAY, TARGET, "bf16"):
        return None
    by_unit = {"tensor cores": 150.0, "exp2": 152.0, "issue slots": 285.0, "L2": 210.0, "HBM": 154.0}
    return Floors(by_unit, "`aot_static.json`")


def page_of(folder: Path, results: Path) -> str:
    return report(folder, results=results, floors=floors).read_text()


def line(text: str, start: str) -> list[str]:
    """The cells of the first table line that starts with this cell."""
    found = next(x for x in text.splitlines() if x.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return keep(tmp_path / "harvest", all_rows())


def test_visible_pairs_and_flop_of_the_target() -> None:
    assert TARGET.visible_pairs == PAIRS and TARGET.is_target
    time = harvest_data.as_timing(time_row("forward", "ours", 1.0, config=TODAY))
    assert time.flop_per_s == 4 * 64 * PAIRS / 1e-3
    time = harvest_data.as_timing(time_row("backward", "ours", 1.0))
    assert time.flop_per_s == 10 * 64 * PAIRS / 1e-3


def test_kernels_beside_their_targets(whole: Path, tmp_path: Path) -> None:
    kernels = section(page_of(whole, tmp_path), "Kernels")
    forward = line(kernels, "attention forward")
    # 4 x 64 x 297.1 M in 0.38 ms are 200.2 TFLOP/s; the first round of 3 repeats, 0.4 ms, does not count.
    assert forward[2] == ">= 220, then 280, then 350 TFLOP/s"
    assert forward[3].startswith("200 TFLOP/s (0.38 ms") and forward[4] == "not met"
    fastest = kernels.split("attention forward")[1].splitlines()[1]
    assert "254 TFLOP/s (64x64, 4 warps, 3 stages) | met up to 220" in fastest
    assert line(kernels, "forward against FlexAttention")[3:] == ["2.5 times (0.95 ms beside 0.38 ms)", "met"]
    assert line(kernels, "forward against SDPA with a mask")[4] == "met"
    assert line(kernels, "forward against the official way")[3].startswith("12 times")
    # 10 x 64 x 297.1 M in 1.5 ms are 126.8 TFLOP/s.
    backward = line(kernels, "attention backward")
    assert backward[3].startswith("127 TFLOP/s") and backward[4] == "not met"
    assert line(kernels, "backward against FlexAttention")[3:] == ["2 times (3 ms beside 1.5 ms)", "not met"]
    longest = line(kernels, "longest over shortest time of a visible pair, N = 50 to 1025, forward")
    assert longest[2] == "<= 1.3 times" and longest[3] == (
        "1.2 times (ps a pair at N 50: 1.53, N 197: 1.28, N 1025: 1.28)"
    )
    assert longest[4] == "met"
    assert line(kernels, "k-means, exact, D 4096, K 8192")[3:] == ["620 TFLOP/s (7 ms)", "met"]
    assert line(kernels, "the same, fast")[4] == "not met"
    assert line(kernels, "k-means ids equal to the float64 argmin")[4] == "met"
    assert line(kernels, "k-means memory, of a 16-bit N x K matrix")[3:] == ["6.25 % (64 MiB)", "met"]
    for name in ("gather by permutation over contiguous input", "permuted embedding, of copy bandwidth"):
        assert line(kernels, name)[3:] == ["not measured", ""], "no row is about it"


def test_wanted_rates_beyond_a_floor_of_todays_tiles_need_other_tiles(whole: Path, tmp_path: Path) -> None:
    """76.1 GFLOP at 280 and 350 TFLOP/s are 272 and 217 us; of dQ and dK/dV no floor is known."""
    told = [x for x in section(page_of(whole, tmp_path), "Kernels").splitlines() if "other tiles" in x]
    assert told == [
        f"- Attention forward at {rate} TFLOP/s takes {us} us and needs other tiles: today's take 285 us of "
        "forward_kernel (issue slots) at least."
        for rate, us in ((280, 272), (350, 217))
    ]


def test_peers_stand_beside_ours_at_every_shape(whole: Path, tmp_path: Path) -> None:
    table = section(page_of(whole, tmp_path), "Kernels").split("`sdpa` sees")[1]
    rows = [[cell.strip() for cell in x.strip("|").split(" | ")] for x in table.splitlines() if x.startswith("| N ")]
    assert len(rows) == 10 and not any("64x64" in cell for row in rows for cell in row)
    assert ["forward", "official", "4.56", "2%", "20", "12", "16.7"] in [row[2:] for row in rows]
    assert ["dkdv", "ours", "0.9", "2%", "20", "1", ""] in [row[2:] for row in rows]


def test_steps_beside_their_targets(whole: Path, tmp_path: Path) -> None:
    steps = section(page_of(whole, tmp_path), "Training step")
    base = line(steps, "ViT-B, c = 60")
    # 2000 x 232 GFLOP are 464 TFLOP/s, 58 % of the better of two ceilings, 28.6 times 70 images/s.
    assert base[3] == (
        "2,000 images/s (compiled, batch 128, 464 TFLOP/s, 58% of the matmul ceiling; 28.6 times the paper's V100)"
    )
    assert base[4] == "met up to 1,800"
    assert line(steps, "ViT-B, c = 60, against the official code")[3:] == ["6.45 times (official 310/s)", "met"]
    assert line(steps, "ViT-S, c = 50, against the official code")[3:] == ["3 times (official 1,000/s)", "not met"]
    assert line(steps, "ViT-T, c = 50")[3:] == ["not measured", ""]


def test_memory_beside_its_targets(whole: Path, tmp_path: Path) -> None:
    memory = section(page_of(whole, tmp_path), "Memory")
    assert line(memory, "ViT-B, micro-batch 96, nothing recomputed: peak")[3:] == ["15 GiB", "met"]
    plan = line(memory, "ViT-B, micro-batch 96, nothing recomputed: plan off by")
    assert plan[3:] == ["6.67 % (planned 14.00 GiB, peak 15.00 GiB)", "met"]
    assert line(memory, "ViT-B, micro-batch 128, cheap recomputation: plan off by")[4] == "not met"
    assert line(memory, "ViT-B, micro-batch 512, blocks: peak")[3:] == ["out of memory", "not met"]
    assert line(memory, "ViT-B, micro-batch 512, blocks: plan off by")[3:] == ["not measured", ""]
    assert line(memory, "speed lost by cheap recomputation")[3] == "not measured"


def test_every_attention_kernel_stands_beside_its_floors(whole: Path, tmp_path: Path) -> None:
    table = section(page_of(whole, tmp_path), "Every attention kernel beside its floors")
    assert "Floors are of `aot_static.json`" in table
    cells = line(table, "forward_kernel")
    assert cells[1:5] == ["N 197 c 50 B 256 H 12 D 64", "bf16", "128x64, 8 warps, 2 stages", "380"]
    assert cells[6:] == ["150", "152", "285", "210", "154", "issue slots", "75%"]
    others = [x for x in table.splitlines() if x.startswith("| ") and "N 197" in x and "no static cost" in x]
    assert len(others) == 4, "the fastest forward and dQ configurations, and today's dQ and dK/dV"
    assert "64x64, 4 warps, 3 stages (fastest) | 300" in table


def test_the_winning_configuration_is_named_and_ready_to_paste(whole: Path, tmp_path: Path) -> None:
    table = section(page_of(whole, tmp_path), "Launch configurations")
    cells = line(table, "forward_kernel")
    assert cells[2:] == [
        "128x64, 8 warps, 2 stages", "64x64, 4 warps, 3 stages", "25.0%", "25.0%", "1", "yes",
    ]  # fmt: skip
    assert line(table, "query_gradient_kernel")[7] == "no, within the noise"
    assert line(table, "key_gradient_kernel")[3:5] == ["today's", "0.0%"]
    code = table.split("```python\n")[1].split("```")[0]
    assert code.splitlines() == [
        "# attention_forward, measured at head size 64 in bf16, target.has_wgmma: 25.0% faster than 128x64, 8 warps, "
        "2 stages",
        "return LaunchConfig(rows=64, keys=64, warps=4, stages=3)",
    ]


def test_what_to_change_first_is_ranked(whole: Path, tmp_path: Path) -> None:
    text = section(page_of(whole, tmp_path), "What to change first")
    found = [x.split(". ", 1)[1] for x in text.strip().splitlines() if x[0:1].isdigit()]
    assert found[0] == (
        "Step of ViT-B (step_base, bf16, batch 128): compile by default on a GPU: 2,000 images/s in place of 1,500, "
        "33.3% faster."
    )
    assert found[1].startswith("attention_forward (bf16): 64x64, 4 warps, 3 stages in place of 128x64")
    assert "speed.skip_dropped off by default in eager mode: 1,500" in found[2]
    # Stalls: 3 of 4, as a warp that was selected does not wait.
    assert "forward_kernel: issue slots busy 81 % of the time: fewer instructions." in found
    assert any(x.startswith("forward_kernel: 75% of the stalls wait for global memory") for x in found)
    assert not any("keep K and V resident" in x for x in found), "L2 is busy 40 % of the time"
    assert text.rstrip().endswith("""```sh
python bench/harvest.py --second harvest --minutes 4 --output harvest-second
python bench/harvest.py --report harvest harvest-second
```""")


def test_wrong_results_come_before_all(tmp_path: Path) -> None:
    rows = all_rows()
    rows["check"][0] |= {"error": 5e-3, "ok": False}
    rows["check"].append({**rows["check"][0], "what": "attention gather dk", "error": None})
    folder = keep(tmp_path / "harvest", rows, {"step": outcome("timed out")})
    found = advice(read(folder))
    assert [x.rank for x in found[:3]] == [0, 0, 1]
    assert (
        "Mend attention plain out_query in bf16: its result is wrong (error 5.00e-03, allowed 2.00e-03)"
        in found[0].text
    )
    text = page_of(folder, tmp_path / "results")
    assert "1 of 3 within their budget" in text and line(text, "attention gather dk")[-1] == "**no**"


def test_l2_rule_and_the_names_of_metrics_by_version() -> None:
    found = counted("forward_kernel", {
        "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": 75.5,
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": 33,
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": 41.0,
        "device__attribute_name": "H200",
    })  # fmt: skip
    assert (found.l2, found.dram, found.tensor, found.issue, found.long_scoreboard) == (75.5, 33.0, 41.0, None, None)


def test_what_failed_is_told_with_the_end_of_its_traceback(tmp_path: Path) -> None:
    trace = "Traceback (most recent call last):\n"
    trace += "".join(f'  File "/opt/some/where/bench/step.py", line {n}, in f\n' for n in range(40)) + "ValueError: bad"
    outcomes = {
        "attention": outcome(),
        "step_base": outcome("failed", reason="ValueError: bad", traceback=trace),
        "counters": outcome("skipped", reason="ncu is not there", log_tail="not to be shown"),
        "memory": outcome("killed", reason="killed by SIGSEGV", log_tail="line before the end"),
    }
    rows = {"attention": [*attention_rows(), {"part": "attention", "kind": "failure", "way": "flex", "reason": "boom"}]}
    text = page_of(keep(tmp_path / "harvest", rows, outcomes), tmp_path / "results")
    told = section(text, "What failed")
    assert "1 ok, 1 failed, 1 skipped, 1 killed" in text
    assert line(told, "step_base")[1:] == ["failed", "10 of 15", "ValueError: bad"]
    assert "ValueError: bad\n```" in told and 'File "bench/step.py", line 39' in told and "line 20," not in told
    assert "/opt/some" not in text and "`parts.step_base` of summary.json" in told
    assert "line before the end" in told and "not to be shown" not in told
    assert line(told, "attention")[1:] == ["flex", "", "boom"]
    assert "Counters: not measured (ncu is not there)." in text


def test_parts_that_are_missing_read_not_measured(tmp_path: Path) -> None:
    text = page_of(keep(tmp_path / "harvest", {"attention": attention_rows()[:2]}), tmp_path / "results")
    tables = section(text, "Kernels") + section(text, "Training step") + section(text, "Memory")
    measured = [x for x in tables.splitlines() if x.startswith("| ") and x.rstrip("| ").endswith("met")]
    assert len(measured) == 2, "the forward pass, today's configuration and the fastest of one"
    assert line(tables, "attention backward")[3:] == ["not measured", ""]
    assert line(tables, "forward against FlexAttention")[3] == "not measured"
    for words in ("Correctness: not measured.", "Ceilings: not measured.", "Counters: not measured."):
        assert words in text
    assert "Other configurations than today's: not measured." in text
    assert {path.name for path in (tmp_path / "results").glob("*.json")} == {
        "harvest_attention_h200_20261201T102030.json", "harvest_device_h200_20261201T102030.json",
    }  # fmt: skip


def test_ceilings_have_their_units(whole: Path, tmp_path: Path) -> None:
    text = section(page_of(whole, tmp_path), "Ceilings of this machine")
    assert line(text, "copy_bytes_per_s")[1] == "4.2 TB/s"
    assert line(text, "matmul_bf16_flops_per_s")[1] == "800 TFLOP/s"


def test_without_ceilings_only_their_share_is_missing(tmp_path: Path) -> None:
    rows = all_rows()
    del rows["machine"]
    steps = section(page_of(keep(tmp_path / "harvest", rows), tmp_path), "Training step")
    assert "464 TFLOP/s; 28.6 times" in steps and "ceiling" not in steps


def test_a_harvest_of_nothing_makes_a_page(tmp_path: Path) -> None:
    text = page_of(keep(tmp_path / "harvest", {}, {}), tmp_path / "results")
    assert "none, as nothing came back" in text and not list((tmp_path / "results").glob("*.json"))
    assert "met |" not in text.replace("met or not |", "")


def test_damage_costs_only_itself_and_is_counted(whole: Path, tmp_path: Path) -> None:
    expected = page_of(whole, tmp_path / "expected")
    path = whole / "parts" / "attention.jsonl"
    negative = time_row("forward", "ours", -1.0, config=TODAY)
    no_shape = {**time_row("forward", "ours", 0.1, config=TODAY), "shape": {"tokens": 197}}
    nothing = {**time_row("forward", "ours", 0.1, config=TODAY), "p50_ms": None}
    odd = [json.dumps(x) for x in (negative, no_shape, nothing, [1], {"a": 1}, {"kind": "step", "model": "base"})]
    cut_off = json.dumps(time_row("forward", "ours", 0.1))[:-30]
    path.write_bytes(b"\xff\x00 no text\n" + path.read_bytes() + "\n".join([*odd, "[" * 100_000, cut_off]).encode())
    text = page_of(whole, tmp_path / "results")
    assert "Could not be read, 9 in all:" in text
    assert "attention.jsonl, line 1: " in text and "p50_ms is None" not in text.split("## Kernels")[1]
    assert section(text, "Kernels") == section(expected, "Kernels")


def test_a_damaged_or_missing_summary_leaves_the_figures(whole: Path, tmp_path: Path) -> None:
    (whole / "summary.json").write_text('{"started": "2026')
    text = page_of(whole, tmp_path / "results")
    assert "summary.json is damaged" in text and "Not known: what became of the parts did not come back." in text
    assert line(text, "forward against FlexAttention")[4] == "met"
    (whole / "summary.json").unlink()
    assert "summary.json is missing" in page_of(whole, tmp_path / "again")


def spoilt(row: dict) -> Iterator[dict]:
    """The row with each of its values replaced by other things, or left out."""
    for name in row:
        for value in (None, "x" * 300, [], -1, math.inf, 1e200, 10**400):
            yield {**row, name: value}
        yield {key: value for key, value in row.items() if key != name}


def test_no_value_in_a_row_or_the_summary_breaks_the_page(whole: Path) -> None:
    """Whatever stands in the place of a value, the line or the summary is used or left out."""
    outcomes = {"step": outcome("failed", reason="ValueError", traceback="Traceback"), "attention": outcome()}
    harvest = read(whole)
    for rows in all_rows().values():
        for row in {(x["kind"], x.get("op"), x.get("fits")): x for x in rows}.values():
            shapes = ({**row.get("shape", {}), "tokens": x, "features": x} for x in (None, 1e200, 10**400))
            for other in [*spoilt(row), *({**row, "shape": shape} for shape in shapes)]:
                (whole / "parts" / "spoilt.jsonl").write_text(json.dumps(other) + "\n")
                found = read(whole)
                assert len(found.damage) <= 1
                page(found, floors, [])
                records(found)
    summary = harvest.summary | {"parts": outcomes}
    for other in [*spoilt(summary), *({**summary, "parts": {"step": x}} for x in spoilt(outcomes["step"]))]:
        (whole / "summary.json").write_text(json.dumps(other))
        found = read(whole)
        page(found, floors, [])
        assert stamp(found) and 0 < len(label(found)) < 100


def archive(folder: Path, source: Path) -> Path:
    """The harvest as it comes back."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / harvest_data.ARCHIVE, "w:gz") as tar:
        for path in sorted(source.rglob("*")):
            if path.is_file():
                tar.add(path, str(path.relative_to(source)))
    return folder


def test_the_archive_gives_the_same_page(whole: Path, tmp_path: Path) -> None:
    packed = archive(tmp_path / "packed" / whole.name, whole)
    assert page_of(packed, tmp_path / "a") == page_of(whole, tmp_path / "b")


def test_an_archive_that_was_cut_off_gives_what_is_whole(whole: Path, tmp_path: Path) -> None:
    packed = archive(tmp_path / "packed", whole) / harvest_data.ARCHIVE
    plain = gzip.decompress(packed.read_bytes())
    place = plain.index(b"parts/step.jsonl")
    packed.write_bytes(gzip.compress(plain[: place + 700]))
    text = page_of(packed.parent, tmp_path / "results")
    assert "harvest.tar.gz cannot be read to its end" in text
    assert line(text, "forward against FlexAttention")[4] == "met"
    assert line(text, "ViT-B, c = 60")[3] == "not measured"


def test_an_archive_cannot_write_elsewhere_or_fill_the_disk(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest_data, "LARGEST_MEMBER", 20_000)
    packed = archive(tmp_path / "packed", whole) / harvest_data.ARCHIVE
    with tarfile.open(packed, "w:gz") as tar:
        for path in sorted(whole.rglob("*.json*")):
            tar.add(path, str(path.relative_to(whole)))
        for name, size in (("../escaped.jsonl", 10), ("parts/large.jsonl", 20_001), ("/parts/../../x", 1)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
        link = tarfile.TarInfo("parts/link.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("parts/step.jsonl/parts/inside.jsonl"))
        late = (json.dumps(time_row("forward", "late", 1.0)) + "\n").encode()
        member = tarfile.TarInfo("parts/zz.jsonl")
        member.size = len(late)
        tar.addfile(member, io.BytesIO(late))
    harvest = read(packed.parent)
    told = "\n".join(harvest.damage)
    assert "inside.jsonl cannot be unpacked" in told and harvest.timings(way="late")
    assert "parts/large.jsonl is too large (20001 bytes)" in told and "parts/link.jsonl is no file of a harvest" in told
    assert "../escaped.jsonl" in told and not list(tmp_path.rglob("escaped*"))
    assert len(harvest.timings(way="flex")) == 2


def test_records_have_what_all_records_have(whole: Path, tmp_path: Path) -> None:
    page_of(whole, tmp_path)
    names = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("harvest_*.json")}
    assert set(names) == {
        f"harvest_{kind}_h200_20261201T102030.json" for kind in ("attention", "step", "kmeans", "memory", "device")
    }
    for record in names.values():
        assert (
            record["commit"] == "c0ffee"
            and record["device"] == "NVIDIA H200"
            and record["versions"]["triton"] == "3.6.0"
        )
        assert record["time"] == "2026-12-01T10:20:30+00:00" and record["command"].startswith("python bench/harvest.py")
    contests = names["harvest_attention_h200_20261201T102030.json"]["contests"]
    target = next(x for x in contests if x["part"] == "attention" and x["shape"]["tokens"] == 197)
    assert target["ways"]["ours"]["timings"]["forward"] == {
        "p20_ms": 0.3762, "p50_ms": 0.38, "p80_ms": 0.3838, "noise": 0.02, "repeats": 20,
    }  # fmt: skip
    assert target["ways"]["flex"]["times_as_long"] == {"forward": 2.5, "backward": 2.0}
    others = next(x for x in contests if x["part"] == "configurations")
    assert "ours 64x64x4x3" in others["ways"] and others["ways"]["ours 64x64x4x3"]["times_as_long"]["forward"] == 0.8
    steps = names["harvest_step_h200_20261201T102030.json"]["contests"]
    base = next(x for x in steps if x["model"] == "base")
    assert base["ways"]["official_eager"]["times_as_long"] == {"step": 4.8387}
    assert names["harvest_memory_h200_20261201T102030.json"]["cases"][2]["fits"] is False
    listed = report_data.collect(tmp_path).left_out
    assert set(listed) == set(names) and set(listed.values()) == {"no contest of ways"}


def test_records_are_never_changed(whole: Path, tmp_path: Path) -> None:
    first = page_of(whole, tmp_path)
    assert page_of(whole, tmp_path) == first, "the same harvest again changes nothing"
    path = whole / "parts" / "kmeans.jsonl"
    path.write_text(path.read_text().replace("7.0", "6.0"))
    with pytest.raises(FileExistsError, match="records are never changed"):
        page_of(whole, tmp_path)


def test_a_dry_run_measures_nothing(tmp_path: Path) -> None:
    small = Shape(1, 2, 9, 2, 16)
    rows = {"attention": [time_row("forward", "ours", 50.0, small, Config(32, 32, 4, 1), dtype="fp16")]}
    rows["check"] = other_rows()["check"]
    folder = keep(tmp_path / "harvest", rows, device="Some CPU", dry_run=True)
    path = report(folder, floors=floors)
    assert path.parent == folder and path.name == "harvest_dry_run_20261201T102030.md"
    text = path.read_text()
    assert "no figure here means anything" in text and line(text, "attention forward")[3] == "not measured"
    assert line(text, "k-means ids equal to the float64 argmin")[3:] == ["not measured", ""]


def test_times_are_written_out() -> None:
    assert [figure(x) for x in (81672.4, 1000.0, 380.25, 0.38)] == ["81,672", "1,000", "380.2", "0.38"]


def test_a_dry_run_asks_for_no_change(tmp_path: Path) -> None:
    text = report(keep(tmp_path / "harvest", all_rows(), dry_run=True), floors=floors).read_text()
    assert section(text, "What to change first").strip() == "A dry run asks for no change."
    assert "```python" not in text


def two_calls(tmp_path: Path) -> tuple[Path, Path]:
    """A first call whose k-means and step broke off, and a second that did them again, on a GPU twice as fast."""
    rows = all_rows()
    del rows["kmeans"]
    first = keep(tmp_path / "first", rows, {part: outcome() for part in rows} | {"kmeans": outcome("timed out")})
    kmeans = [row | {"p50_ms": 3.5} for row in other_rows()["kmeans"]]
    tuned = configurations_at("forward", {TARGET: {TODAY: 0.19, OTHER: 0.188}}, part="tuned")
    steps = [row | {"part": "step_tuned", "tuned": True} for row in step_rows()]
    second = keep(
        tmp_path / "second", {"kmeans": kmeans, "tuned": tuned, "step_tuned": steps},
        {"kmeans": outcome(), "tuned": outcome(), "step_tuned": outcome("failed", traceback="Error: x")},
        call=2, started="2026-12-02T10:20:30+00:00", commit="a" * 40, command="python bench/harvest.py --second first",
    )  # fmt: skip
    return first, second


def test_two_calls_make_one_page(tmp_path: Path) -> None:
    """In whichever order they are given; each keeps its records, and each figure says its call."""
    first, second = two_calls(tmp_path)
    path = report(second, first, results=tmp_path / "results", floors=floors)
    assert path.name == "harvest_h200_20261202T102030.md"
    text = path.read_text()
    assert text.startswith(
        "# Harvest of NVIDIA H200, 2 calls, 2026-12-01T10:20:30+00:00 and 2026-12-02T10:20:30+00:00\n"
    )
    assert "- Call 1, NVIDIA H200: commit `c0ffee`" in text and "- Call 2, NVIDIA H200: commit `aaaaaaaaaaaa`" in text
    assert line(text, "attention forward")[3] == "200 TFLOP/s (0.38 ms, bf16, noise 2%, call 1)"
    assert line(text, "forward against FlexAttention")[3] == "2.5 times (0.95 ms beside 0.38 ms, call 1)"
    assert line(text, "k-means, exact, D 4096, K 8192")[3] == "620 TFLOP/s (3.5 ms, call 2)"
    assert line(text, "ViT-B, c = 60")[3].endswith("V100, call 1)")
    assert line(text, "ViT-B, micro-batch 96, nothing recomputed: peak")[3] == "15 GiB (call 1)"
    assert line(section(text, "Training step"), "step_tuned, call 2")[1] == "base"
    # 25 % in the first call, 1 % and within the noise in the second, by as many repeats: the newer pair counts.
    assert line(section(text, "Launch configurations"), "forward_kernel")[5] == "1.1%"
    todo = section(text, "What to change first")
    assert "Mend the part step_tuned, call 2: failed." in todo and "kmeans" not in todo and "--second" not in todo
    assert line(section(text, "What failed"), "kmeans, call 1")[1] == "timed out"
    assert "step_tuned, call 2; the whole is `parts.step_tuned` of summary.json" in text
    names = {path.name for path in (tmp_path / "results").glob("harvest_kmeans*")}
    assert names == {"harvest_kmeans_h200_20261202T102030.json"}, "the first call has none"
    record = json.loads((tmp_path / "results" / names.pop()).read_text())
    assert (record["call"], record["command"]) == (2, "python bench/harvest.py --second first")


def test_a_second_call_alone_says_so(tmp_path: Path) -> None:
    _, second = two_calls(tmp_path)
    text = page_of(second, tmp_path / "results")
    assert text.startswith("# Harvest of NVIDIA H200, second call, ") and "Of the second call alone" in text
    assert "Then the second call" not in text and "a second call runs it again" not in text


def test_a_machine_without_a_gpu_leaves_no_page_among_the_results(tmp_path: Path) -> None:
    outcomes = {"machine": outcome("skipped", reason="torch finds no CUDA device"), "kmeans": outcome("skipped")}
    folder = keep(tmp_path / "harvest", {}, outcomes, device=None)
    before = set(RESULTS.iterdir())
    with pytest.raises(Refused, match="found no GPU and measured nothing"):
        report(folder)
    assert set(RESULTS.iterdir()) == before
    hung = keep(tmp_path / "hung", {}, {"machine": outcome("timed out"), "kmeans": outcome("failed")}, device=None)
    with pytest.raises(Refused, match="found no GPU"):
        report(hung)
    dry = keep(tmp_path / "dry", {}, outcomes, dry_run=True)
    with pytest.raises(Refused, match="a dry run and a real one"):
        report(folder, dry)


def test_no_harvest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no harvest: neither harvest\.tar\.gz nor summary\.json"):
        report(tmp_path, results=tmp_path)


def configurations_at(op: str, by_shape: dict[Shape, dict[Config, float]], **more) -> list[dict]:
    """Rows of a part "configurations", TODAY being today's."""
    return [
        time_row(op, "ours", ms, shape, config, **({"part": "configurations", "default": config == TODAY} | more))
        for shape, times in by_shape.items()
        for config, ms in times.items()
    ]


def test_configurations_are_compared_with_todays_where_both_were_timed(tmp_path: Path) -> None:
    """One that lacks a length is not dropped, one that lacks the target is; the second call takes the same one."""
    rows = configurations_at("forward", {
        TARGET: {TODAY: 0.4, OTHER: 0.39, SMALL_CONFIG: 0.3},
        other_length(785, 199): {TODAY: 0.5, OTHER: 0.49, Config(16, 16, 4, 1): 0.1},
        other_length(1025, 260): {TODAY: 0.6, OTHER: 0.58, SMALL_CONFIG: 0.5},
    })  # fmt: skip
    (found,) = winners(read(keep(tmp_path / "harvest", {"configurations": rows})))
    assert (found.best, found.shapes, found.size) == (SMALL_CONFIG, 2, 64) and found.worth_it
    assert found.at_target == pytest.approx(1 / 3) and found.gain == pytest.approx(math.sqrt(4 / 3 * 6 / 5) - 1)
    assert best_configurations([*rows, {"kind": "time", "op": "dq"}]) == {"forward": SMALL_CONFIG._asdict()}


def test_configurations_are_compared_within_one_part_and_dtype(tmp_path: Path) -> None:
    """A candidate is held against today's of its own part: in the other, on a slower device, it would have lost."""
    rows = configurations_at("forward", {TARGET: {TODAY: 0.4, OTHER: 0.3}})
    rows += configurations_at("forward", {TARGET: {TODAY: 0.8, SMALL_CONFIG: 0.5}}, part="tuned")
    rows += configurations_at("forward", {TARGET: {TODAY: 0.4, OTHER: 0.2}}, dtype="fp16")
    bf16, fp16 = winners(read(keep(tmp_path / "harvest", {"configurations": rows})))
    assert (bf16.best, bf16.gain, fp16.best) == (SMALL_CONFIG, pytest.approx(0.6), OTHER)
    assert best_configurations(rows) == {"forward": SMALL_CONFIG._asdict()}


def test_too_few_repeats_and_a_gain_within_the_noise_advise_nothing(tmp_path: Path) -> None:
    few = [row | {"repeats": 2} for row in configuration_rows() + step_rows()]
    noisy = [row | {"p20_ms": 0.5 * row["p50_ms"], "p80_ms": 2 * row["p50_ms"], "noise": 1.5} for row in step_rows()]
    for name, rows in (("few", few), ("noisy", noisy)):
        folder = keep(tmp_path / name, {"mixed": rows})
        assert advice(read(folder)) == []
        text = page_of(folder, tmp_path / f"{name}_results")
        assert "```python" not in text and "Nothing that came back asks for a change." in text
        noise = line(section(text, "Training step"), "step_base")[8]
        assert noise == ("-" if name == "few" else "150%")


def test_modes_are_compared_within_one_part_and_batch(tmp_path: Path) -> None:
    """A faster rehearsal of a V100, or a part with another launch table, does not stand in for the step itself."""
    own = [row for row in step_rows() if row["mode"] == "eager" and row["way"] == "ours"]
    fast = next(row for row in step_rows() if row["mode"] == "compiled")
    others = [
        {**row, "part": part, "images_per_s": speed, **more}
        for part, more in (
            ("step_volta", {"dtype": "fp16", "batch": 32}), ("step_tuned", {"tuned": True}), ("step_new", {"batch": 64})
        )
        for row, speed in ((own[0], 100.0), (fast, 9000.0))
    ]  # fmt: skip
    found = advice(read(keep(tmp_path / "harvest", {"mixed": own + others})))
    assert [x.text[:48] for x in found] == ["Step of ViT-B (step_new, bf16, batch 64): compil"]


def test_the_page_says_which_configurations_a_tuned_step_had(tmp_path: Path) -> None:
    row = {**step_rows()[0], "part": "step_tuned", "tuned": True, "configs": {"dq": OTHER._asdict()}}
    text = page_of(keep(tmp_path / "harvest", {"step_tuned": [row]}), tmp_path)
    told = "step_tuned ran with the fastest configurations of the first call: dq 64x64, 4 warps, 3 stages."
    assert told in section(text, "Training step")


def test_floors_come_from_records_of_the_same_kernels_and_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(name: str, commit: str, triton: str, time: str, issue: float) -> None:
        kernel = {
            "shape": "target", "floors": {"issue slots": issue, "HBM": 154.0},
            "compiled": {"kernel": "query_gradient_kernel", **TODAY._asdict()},
        }  # fmt: skip
        case = {**TARGET._asdict(), "dtype": "bf16", "variant": "plain"}
        content = {"gpu": {"name": "H200"}, "triton": triton, "time": time, "shapes": {"target": case}}
        content |= {"commit": commit, "kernels": [kernel]}
        (tmp_path / name).write_text(json.dumps({"suite": "aot", **content}))

    same = {"this": True, "unknown": None, "before": False}
    monkeypatch.setattr(harvest_floors, "same_kernels", lambda commit, other=None: same[other or commit])
    monkeypatch.setattr(harvest_floors, "compiled", lambda *_: None)
    record("aot_a.json", "this", "3.6.0", "2026-11-01", 350.0)
    record("aot_b.json", "this", "3.6.0", "2026-11-02", 320.0)
    record("aot_c.json", "this", "3.8.0", "2026-11-03", 300.0)
    record("aot_d.json", "unknown", "3.6.0", "2026-11-04", 200.0)
    record("aot_e.json", "before", "3.6.0", "2026-11-05", 100.0)
    (tmp_path / "aot_early.json").write_text(json.dumps({"suite": "aot", "kernels": [{"kernel": "x"}]}))
    (tmp_path / "aot_broken.json").write_text("{")

    def found(device: str, triton: str) -> Floors | None:
        return harvest_floors.finder(tmp_path, device, triton, "this")("dq", TODAY, TARGET, "bf16")

    assert found("NVIDIA H200", "3.6.0") == Floors({"issue slots": 320.0, "HBM": 154.0}, "`aot_b.json`")
    assert found("NVIDIA H200", "3.6.0").binding == "issue slots"
    assert found("NVIDIA H200", "3.8.0").largest == 300.0
    assert found("NVIDIA A100", "3.6.0") is None
    for name in "abc":
        (tmp_path / f"aot_{name}.json").unlink()
    doubted = found("NVIDIA H200", "3.6.0")
    assert doubted.largest == 200.0 and doubted.source == "`aot_d.json` (its kernels may be others than the harvest's)"
    (tmp_path / "aot_d.json").unlink()
    assert found("NVIDIA H200", "3.6.0") is None, "those of other kernels are no floors of these"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commits_are_compared_by_their_kernels() -> None:
    def commit(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() or pytest.skip("no history of git here")

    kernel = commit("log", "-1", "--format=%H", "--", *harvest_floors.SOURCES)
    before = commit("rev-parse", "--verify", "--quiet", f"{kernel}^")
    assert harvest_floors.same_kernels(kernel, kernel) is True
    assert harvest_floors.same_kernels(before, kernel) is False
    assert harvest_floors.same_kernels("c0ffee" * 6 + "0000", kernel) is None
    assert harvest_floors.same_kernels("", kernel) is None and harvest_floors.same_kernels(kernel, "") is None
    assert harvest_floors.same_kernels("--output=/tmp/written", kernel) is None


@pytest.mark.slow
def test_floors_that_no_record_holds_are_compiled(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("bench.aot_cases")
    find = harvest_floors.finder(tmp_path, "NVIDIA H200", "3.6.0")
    found = find("forward", OTHER, TARGET, "bf16")
    assert set(found.by_unit) == set(harvest_floors.UNITS) and "compiled for this page" in found.source
    # The visible pairs alone take the tensor cores 4 x 64 x 297.1 M / (132 x 1.75 GHz x 4096) = 80.4 us.
    assert 80.4 < found.by_unit["tensor cores"] < 160.8
    assert find("forward", Config(64, 64, 3, 3), TARGET, "bf16") is None, "no power of two warps: cannot be compiled"


def test_the_page_needs_the_standard_library_alone(whole: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {{*sys.stdlib_module_names, "bench"}}:
            raise ModuleNotFoundError(f"No module named {{name}}", name=name)

sys.meta_path.insert(0, Nothing())
sys.path.insert(0, {str(ROOT)!r})
from bench.harvest_report import report
print(report(Path({str(whole)!r}), results=Path({str(tmp_path / "out")!r})).read_text())
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert line(done.stdout, "forward against FlexAttention")[4] == "met"
