"""The page is made of records alone, names the file of each figure, and says which records it does not show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from bench import records, report, report_data, report_plots
from bench.report import Report

HEAD = {"time": "2026-01-02T00:00:00+00:00", "device": "Chip", "threads": 2, "commit": "c", "measured_on": "cpu"}
PHASES = ("forward", "backward", "both")


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
        "ours": row(median, images=batch, peak=10.0 * batch),
        "official": row(2 * median, images=batch, peak=20.0 * batch, ratio=2.0),
        "ours_compiled": {"status": "wrong", "reason": "loss errs 7 times as much as is allowed"},
    }
    return {
        "name": f"tiny fp32 batch {batch} {image}/{patch} px", "model": "tiny", "dtype": "fp32", "batch": batch,
        "tokens": (image // patch) ** 2 + 1, "image_size": image, "patch_size": patch, "phases": ["step"],
        "base": "ours", "ways": ways, **more,
    }  # fmt: skip


def attention(tokens: int) -> dict:
    made = {
        "status": "timed", "timings": {phase: timing(20.0) for phase in PHASES},
        "tflop_per_s": dict.fromkeys(PHASES, 0.05), "roofline_fraction": dict.fromkeys(PHASES, 0.5),
    }  # fmt: skip
    return {
        "name": f"tokens {tokens}", "label": f"tokens {tokens}", "tokens": tokens, "heads": 3, "size": 64,
        "dtype": "fp32", "phases": list(PHASES), "base": "ours_sdpa", "ways": {"ours_sdpa": made, "official": made},
        "costs": {phase: {"flop": 4 * 64 * 1e6, "bytes": 10**7} for phase in PHASES},
    }  # fmt: skip


def keep(folder: Path, name: str, suite: str, contests: list[dict], **more) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"suite": suite, **HEAD, "contests": contests, **more}))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with records of most suites."""
    keep(tmp_path, "step_new", "step", [step(2), step(8), step(image=112), step(patch=32)])
    keep(tmp_path, "attention", "attention", [attention(50), attention(197)])
    loading = {**step(), "name": "loader alone", "phases": ["batch"], "ways": {"ours": row(10.0, "batch", images=256)}}
    keep(tmp_path, "pretrain", "pretrain", [step(), loading])
    context = row(50.0, another_task="another task: timm's plain ViT")
    keep(tmp_path, "peers", "peers", [{**step(), "name": "step tiny", "ways": {"ours": row(9.0), "timm_vit": context}}])
    return tmp_path


def page(folder: Path) -> str:
    return report.run(Report(folder, folder / "page")).read_text()


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_section_has_its_figures_and_their_files(made: Path) -> None:
    text = page(made)
    throughput = section(text, "One training step")
    assert "### CPU, Chip, 2 threads" in throughput
    line = "| tiny fp32 batch 8 224/16 px | `official` | step | 200 | 4 % | 40 |  | 160 | 2.00 | `step_new.json` |"
    assert line in throughput and "| contest | way | phase | ms |" in throughput
    assert (
        "wrong: loss errs 7 times" in throughput and "`ours_compiled` of tiny" in throughput and "2 more" in throughput
    )
    assert "| loader alone | `ours` | batch | 10 |" in section(text, "Pre-training, data included")
    assert "| tokens 50 | `official` | both | 20 | 4 % |  | 50.0 |" in section(
        text, "Two-stream attention and its peers"
    )
    assert "(another task: timm's plain ViT)" in section(text, "Peers, as measured until November 2026")
    assert section(text, "Tokenising").strip() == "No record yet: `python -m bench tokenize`."
    assert "several times more slowly" in text and "lower bound" in text


def test_every_picture_is_there_and_shows_something(made: Path) -> None:
    text = page(made)
    named = {part.split(")")[0] for part in text.split("](")[1:]}
    assert named == {path.name for path in (made / "page").glob("*.png")}
    assert {name.split("_cpu")[0] for name in named} == {
        "step_step", "attention_both", "pretrain_step", "pretrain_batch", "peers_step",
    }  # fmt: skip
    for name in named:
        assert imread(made / "page" / name)[..., :3].std() > 0.03, name


def test_one_record_is_drawn(made: Path, capsys) -> None:
    report_plots.run(report_plots.Plot((made / "step_new.json",)))
    assert capsys.readouterr().out.count("picture: ") == len(list(made.glob("step_new_*.png"))) == 1
    (made / "empty.json").write_text(json.dumps({"suite": "step", **HEAD, "contests": []}))
    (made / "half.json").write_text("{")
    for name, reason in (("empty", "has nothing to draw"), ("half", "is no record"), ("none", "is no record")):
        with pytest.raises(ValueError, match=rf"{name}\.json {reason}"):
            report_plots.run(report_plots.Plot((made / f"{name}.json",)))


def test_the_newest_record_of_a_contest_is_shown(made: Path) -> None:
    keep(made, "step_later", "step", [step(median=50.0)], time="2026-03-01T00:00:00+00:00")
    noisy = step()
    noisy["ways"]["ours"]["timings"]["step"] = timing(70.0, 0.3)
    keep(made, "step_other", "step", [noisy], device="Other chip", measured_on="cuda")
    text = section(page(made), "One training step")
    assert "| tiny fp32 batch 8 224/16 px | `ours` | step | 50 | 4 % | 160 |  | 80 |  | `step_later.json` |" in text
    assert "| tiny fp32 batch 2 224/16 px | `ours` | step | 100 |" in text, "of the older record: no newer one has it"
    assert "| step | 70 | 30 % (!) |" in text, "noise is marked where it is large"
    assert "### Other chip\n" in text
    assert text.index("### Other chip") < text.index("### CPU"), "GPUs first"


def test_records_that_are_odd_are_named_and_left_out(made: Path) -> None:
    broken = step()
    broken["ways"]["ours"]["timings"]["step"] = {"p50_ms": 1.0}
    keep(made, "no_quantiles", "step", [broken])
    (made / "early.json").write_text(json.dumps({"suite": "step", **HEAD, "timings": {}}))
    (made / "list.json").write_text("[1]")
    (made / "half.json").write_text('{"suite": "step"')
    (made / "other.json").write_text('{"a": 1}')
    keep(made, "aot", "aot", [])
    told = section(page(made), "Records not shown")
    for name, reason in (
        ("no_quantiles", "KeyError: 'p20_ms'"), ("early", "of an earlier format"), ("list", "TypeError"),
        ("half", "JSONDecodeError"), ("other", "KeyError: 'suite'"), ("aot", "no contest of ways"),
    ):  # fmt: skip
        (line,) = [line for line in told.splitlines() if line.startswith(f"- `{name}.json`")]
        assert reason in line


def test_the_records_kept_here_make_a_page(tmp_path: Path) -> None:
    """Also the figures of the README are on it, or of an earlier record of their contest."""
    collected = report_data.collect(records.RESULTS)
    assert not [reason for reason in collected.left_out.values() if reason.startswith("not understood")]
    text = report.run(Report(output=tmp_path)).read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures and all((tmp_path / name).stat().st_size > 5000 for name in pictures)
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name in re.findall(r"`((?:step|pretrain)_tiny\w+\S+?\.json)`", readme):
        assert list(report_data.read(records.RESULTS / name)), name
    with pytest.raises(ValueError, match="is no folder of records"):
        report.run(Report(tmp_path / "nowhere", tmp_path))
