"""The page is made of records alone, whatever version wrote them, and names the file of each figure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from bench import records, report, report_data
from bench.report import Report

HEAD = {"time": "2026-01-02T00:00:00+00:00", "device": "Chip", "threads": 2, "commit": "c", "measured_on": "cpu"}
RATES = {"bytes_per_second": 1e10, "flop_per_second": {"fp32": 1e11}}


def timing(median: float, noise: float = 0.04) -> dict[str, float]:
    low, high = median * (1 - noise / 2), median * (1 + noise / 2)
    return {"p20_ms": low, "p50_ms": median, "p80_ms": high, "noise": noise, "repeats": 5}


def row(median: float, phase: str = "step", *, images: int = 8, peak: float = 0.0, ratio: float = 0.0, **more) -> dict:
    made = {"status": "timed", "timings": {phase: timing(median)}, **more}
    if images:
        made["images_per_second"] = {phase: images / median * 1e3}
    if peak:
        made["memory"] = {"peak_bytes": int(peak * 2**20), "how": "counted"}
    if ratio:
        made["times_as_long"] = {phase: ratio}
    return made


def step(batch: int = 8, *, image: int = 224, patch: int = 16, median: float = 100.0, **more) -> dict:
    ways = {
        "ours": row(median, images=batch, peak=10.0 * batch, micro_batch=batch),
        "official": row(2 * median, images=batch, peak=20.0 * batch, ratio=2.0, micro_batch=batch),
        "ours_compiled": {"status": "wrong", "reason": "loss errs 7 times as much as is allowed"},
    }
    return {
        "name": f"tiny fp32 batch {batch} {image}/{patch} px", "model": "tiny", "dtype": "fp32", "batch": batch,
        "tokens": (image // patch) ** 2 + 1, "image_size": image, "patch_size": patch, "phases": ["step"],
        "base": "ours", "ways": ways, **more,
    }  # fmt: skip


def kernel(op: str, way: str, tokens: int = 197) -> dict:
    cost = {"flop": 4 * 64 * 1e6, "bytes": 10**7}
    phases = ("forward", "backward", "both")
    made = {
        "status": "timed", "timings": {phase: timing(20.0) for phase in phases},
        "tflop_per_s": dict.fromkeys(phases, 0.05), "roofline_fraction": dict.fromkeys(phases, 0.5),
    }  # fmt: skip
    return {
        "name": f"{op} block fp32 ({tokens})", "op": op, "label": "block", "shape": {"tokens": tokens, "size": 64},
        "dtype": "fp32", "phases": list(phases), "base": way, "costs": dict.fromkeys(phases, cost),
        "ways": {way: made, "plain_torch": made},
    }  # fmt: skip


def keep(folder: Path, name: str, suite: str, contests: list[dict], **more) -> None:
    record = {"suite": suite, **HEAD, "rates": RATES, "contests": contests, **more}
    (folder / f"{name}.json").write_text(json.dumps(record))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a record of every suite."""
    sweep = [step(b) for b in (2, 8)] + [step(image=112), step(patch=32)]
    keep(tmp_path, "step_new", "step", sweep)
    ops = (
        ("permuted_embed", "reference", 197),
        ("two_stream_attention", "sdpa", 197),
        ("two_stream_attention", "sdpa", 50),
    )
    keep(tmp_path, "kernels", "kernels", [kernel(*op) for op in ops])
    loading = {**step(), "name": "loader alone", "phases": ["batch"], "ways": {"ours": row(10.0, "batch", images=256)}}
    keep(tmp_path, "pretrain", "pretrain", [step(), loading])
    switches = {
        "base": row(100.0, peak=10),
        "fused_off": row(120.0, peak=9),
        "fp8_on": {"status": "failed", "reason": "x"},
    }
    keep(tmp_path, "ablation", "ablation", [{**step(), "name": "tiny fp32 batch 8", "ways": switches, "base": "base"}])
    context = row(50.0, another_task="another task: timm's plain ViT")
    keep(
        tmp_path, "peers", "peers", [{**step(), "name": "step tiny", "ways": {"ours": row(100.0), "timm_vit": context}}]
    )
    keep(tmp_path, "kmeans", "kmeans", [
        {**step(), "name": "D 64 K 256", "phases": ["assign"], "ways": {"exact": row(5.0, "assign", images=0)}},
    ])  # fmt: skip
    return tmp_path


def page(folder: Path) -> str:
    return report.run(Report(folder, folder / "page")).read_text()


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_section_has_its_figures_and_their_files(made: Path) -> None:
    text = page(made)
    throughput = section(text, "One training step")
    assert "### CPU, Chip, 2 threads" in throughput
    assert "| tiny fp32 batch 8 224/16 px | `official` | step | 200 | 4 % | 40 | 2.00 | `step_new.json` |" in throughput
    assert "wrong: loss errs 7 times" in throughput and "`ours_compiled` of tiny" in throughput
    pretraining = section(text, "Pre-training, data included")
    assert (
        "20,000 images per second are wanted" in pretraining and "| loader alone | `ours` | batch | 10 |" in pretraining
    )
    switches = section(text, "What each switch gains")
    assert "| `fused` | on | 100.0 | 120.0 | +20.0 % | 4 % | -1 MiB |" in switches and "`ablation.json`" in switches
    assert "| two_stream_attention block fp32 (197) | `sdpa` | 50.0 | 50.0 |" in section(
        text, "Roofline of the kernels"
    )
    assert "(another task: timm's plain ViT)" in section(text, "Peers")
    assert "| ours, tiny fp32 image 224 patch 16 | 8 | 80 |" in section(text, "Memory against the micro-batch")
    tokens = section(text, "Scaling with the number of tokens")
    assert "| official, tiny fp32 image 224 batch 8 | 50 | 25 |" in tokens and "| sdpa, fp32 | 50 | 20 |" in tokens
    assert "| ours, tiny fp32 patch 16 batch 8 | 112 | 12.5 |" in section(text, "Scaling with the size of images")
    assert "| D 64 K 256 | `exact` | assign | 5 |" in section(text, "k-means")
    assert section(text, "Tokenising").strip() == "No record yet: `python -m bench run --suite tokenize`."


def test_every_picture_is_there_and_shows_something(made: Path) -> None:
    text = page(made)
    named = {part.split(")")[0] for part in text.split("](")[1:]}
    assert named == {path.name for path in (made / "page").glob("*.png")} and len(named) == 9
    for name in named:
        assert imread(made / "page" / name)[..., :3].std() > 0.03, name


def test_the_newest_record_of_a_contest_is_shown(made: Path) -> None:
    keep(made, "step_later", "step", [step(median=50.0)], time="2026-03-01T00:00:00+00:00")
    keep(made, "step_another", "step", [step(median=70.0)], time="2026-04-01T00:00:00+00:00", device="Other chip")
    text = section(page(made), "One training step")
    assert "| tiny fp32 batch 8 224/16 px | `ours` | step | 50 | 4 % | 160 |  | `step_later.json` |" in text
    assert "| tiny fp32 batch 2 224/16 px | `ours` | step | 100 |" in text, (
        "of the older record, as no newer one has it"
    )
    assert "### CPU, Other chip, 2 threads" in text and "| step | 70 |" in text


def test_records_that_are_odd_are_named_and_left_out(made: Path) -> None:
    broken = step()
    broken["ways"]["ours"]["timings"]["step"] = {"p50_ms": 1.0}
    keep(made, "no_quantiles", "step", [broken])
    keep(made, "unknown", "mystery", [step()])
    (made / "unknown.json").write_text(json.dumps({"suite": "mystery", **HEAD}))
    (made / "list.json").write_text("[1]")
    (made / "half.json").write_text('{"suite": "step"')
    (made / "other.json").write_text('{"a": 1}')
    keep(made, "aot", "aot", [])
    told = section(page(made), "Records not shown")
    for name, reason in (
        ("no_quantiles", "KeyError: 'p20_ms'"), ("unknown", "unknown suite 'mystery'"), ("list", "TypeError"),
        ("half", "JSONDecodeError"), ("other", "KeyError: 'suite'"), ("aot", "no contest of ways"),
    ):  # fmt: skip
        (line,) = [line for line in told.splitlines() if line.startswith(f"- `{name}.json`")]
        assert reason in line


def test_early_records_are_understood(tmp_path: Path) -> None:
    early = {**HEAD, "command": "python -m bench step --device cuda"}
    del early["measured_on"]
    ways = {"ours": timing(10.0), "official": timing(30.0), "official_with_masks": timing(40.0)}
    step_record = {"suite": "step", **early, "model": "base", "dtype": "bf16", "batch": 4, "cut": 50, "timings": ways}
    (tmp_path / "step.json").write_text(json.dumps({**step_record, "compile": True}))
    size = {"features": 8, "clusters": 4, "skipped": {"faiss_gpu": "not installed"}}
    size["ways"] = {"exact": {"timing": timing(2.0), "tflops": 0.1, "equal_ids": 1.0}}
    kmeans = {"suite": "kmeans", **early, "device_type": "cpu", "rows": 9, "dtype": "fp16", "sizes": [size]}
    (tmp_path / "kmeans.json").write_text(json.dumps({**kmeans, "command": ""}))
    tokenize = {"precision": "fp32", "images": 6, "images_per_second": 12.5, "bottleneck": "decode"}
    (tmp_path / "tokenize.json").write_text(json.dumps({"suite": "tokenize", **early, **tokenize, "command": ""}))
    found = {entry.suite: entry for entry in report_data.collect(tmp_path).entries}
    assert found["step"].device == "Chip" and found["step"].name == "base bf16 batch 4 compiled"
    assert found["step"].timed["official_with_masks"]["times_as_long"] == {"step": 4.0}
    assert found["step"].timed["ours_compiled"]["images_per_second"] == {"step": 400.0}
    assert found["kmeans"].device == "CPU, Chip, 2 threads" and found["kmeans"].untimed["faiss_gpu"].startswith(
        "unavail"
    )
    text = page(tmp_path)
    assert "| kclip fp32 6 images, by stage | `pipeline` | files_to_cache |  |  | 12.5 |" in text


def test_the_records_kept_here_make_a_page(tmp_path: Path) -> None:
    collected = report_data.collect(records.RESULTS)
    assert collected.of("step") and collected.of("attention")
    assert not [reason for reason in collected.left_out.values() if reason.startswith("not understood")]
    report.run(Report(output=tmp_path))
    text = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures and all((tmp_path / name).stat().st_size > 5000 for name in pictures)
    (path, record), *_ = collected.curves.items()
    assert f"| fp16 | {100 * record['largest_difference']['fp16']:.3f} % |" in text and f"{path.stem}.png" in pictures
    with pytest.raises(ValueError, match="is no folder of records"):
        report.run(Report(tmp_path / "nowhere", tmp_path))


def test_noise_is_marked_where_it_is_large(tmp_path: Path) -> None:
    noisy = step()
    noisy["ways"]["ours"]["timings"]["step"] = timing(100.0, 0.3)
    keep(tmp_path, "step", "step", [noisy])
    assert "| `ours` | step | 100 | 30 % (!) |" in page(tmp_path)
