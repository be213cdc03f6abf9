"""The page and the record of the made-up harvest in tests/data/harvest: of all of it, of parts, damaged, of nothing."""

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
from itertools import product
from pathlib import Path

import pytest

from bench import harvest_data, report_data
from bench.harvest_advice import STALLS, advice, counted, winners
from bench.harvest_data import Config, Harvest, Refused, Shape, Timing, read
from bench.harvest_report import RESULTS, figure, finder, name_of, page, record, report
from bench.harvesting.parts import best_configurations

ROOT = Path(__file__).parent.parent
STORED = ROOT / "tests/data/harvest"
ROWS = {path.stem: [json.loads(x) for x in path.open()] for path in (STORED / "parts").iterdir()}
TARGET = Shape(256, 12, 197, 50, 64)
PAIRS = 297_145_344
"""3072 images x heads, 491 rows of 197 keys each: the 297.1 million visible pairs of the target."""
TODAY, OTHER, SMALL = Config(128, 64, 8, 2), Config(64, 64, 4, 3), Config(32, 128, 8, 2)


def outcome(status: str = "ok", **more) -> dict:
    return {
        "status": status, "seconds": 9.6, "limit": 15.0, "returncode": 0, "reason": None, "traceback": None,
        "log_tail": "", **more,
    }  # fmt: skip


def keep(folder: Path, rows: dict[str, list[dict]], outcomes: dict[str, dict] | None = None, **more) -> Path:
    (folder / "parts").mkdir(parents=True)
    for part, lines in rows.items():
        (folder / "parts" / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = outcomes if outcomes is not None else {part: outcome() for part in rows}
    summary = json.loads((STORED / "summary.json").read_text()) | {"parts": parts, **more}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def floors(op: str, config: Config, shape: Shape, dtype: str) -> dict[str, float]:
    """Of today's forward configuration at the target alone."""
    known = (op, config, shape, dtype) == ("forward", TODAY, TARGET, "bf16")
    return {"tensor cores": 150.0, "issue slots": 285.0, "L2": 210.0} if known else {}


def page_of(folder: Path, results: Path) -> str:
    return report(folder, results=results, floors=floors).read_text()


def line(text: str, *start: str) -> list[str]:
    """The cells of the first table line that starts with these cells."""
    found = next(x for x in text.splitlines() if x.startswith(f"| {' | '.join(start)} |"))
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return shutil.copytree(STORED, tmp_path / "harvest")


def timing(op: str, ms: float, config: Config | None = None, shape: Shape = TARGET, **more) -> Timing:
    fields = {"part": "configurations", "way": "ours", "dtype": "bf16", "default": config == TODAY, "repeats": 20}
    return Timing(op=op, shape=shape, config=config, p20=0.99 * ms, p50=ms, p80=1.01 * ms, **fields | more)


def test_visible_pairs_and_flop_of_the_target() -> None:
    assert TARGET.visible_pairs == PAIRS and TARGET.is_target
    for op, flop in (("forward", 4), ("backward", 10)):
        assert timing(op, 1.0).flop_per_s == flop * 64 * PAIRS / 1e-3


def test_the_page(whole: Path, tmp_path: Path) -> None:
    """The stored page, whose figures were worked out by hand: 4 x 64 x 297.1 M FLOP in 0.38 ms are 200.2 TFLOP/s (the
    first round of 3 repeats, 0.4 ms, does not count), 10 x 64 x 297.1 M in 1.5 ms 126.8; 2000 images of 232 GFLOP are
    464 TFLOP/s, 58 % of the better of two ceilings; 64 MiB are 6.25 % of 65536 x 8192 in 16 bits. A configuration of
    the forward kernel is a fourth faster, one of dQ within the noise. 3 of 4 stalls are of the long scoreboard.
    """
    assert page_of(whole, tmp_path).splitlines() == (ROOT / "tests/data/harvest_page.md").read_text().splitlines()


def test_wrong_results_come_before_all(tmp_path: Path) -> None:
    wrong = [ROWS["check"][0] | {"ok": False, "error": error} for error in (5e-3, None)]
    folder = keep(tmp_path / "harvest", {**ROWS, "check": [*wrong, ROWS["check"][1]]}, {"step": outcome("timed out")})
    found = advice(read(folder))
    assert [x.rank for x in found[:3]] == [0, 0, 1]
    told = "Mend attention plain out_query in bf16: its result is wrong (check), error 5.00e-03, allowed 2.00e-03"
    assert told in found[0].text
    text = section(page_of(folder, tmp_path / "results"), "Correctness")
    assert "1 of 3 within their budget" in text and line(text, "check", "attention plain out_query")[6] == "**no**"


def test_the_names_of_metrics_by_version() -> None:
    found = counted({
        "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": 75.5,
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": 33,
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": 41.0,
        "device__attribute_name": "H200",
    })  # fmt: skip
    expected = {"issue slots": None, "tensor cores": 41.0, "L2": 75.5, "DRAM": 33.0, "occupancy": None, STALLS: None}
    assert found == expected


def test_parts_that_are_missing_read_not_measured(tmp_path: Path) -> None:
    text = page_of(keep(tmp_path / "harvest", {"attention": ROWS["attention"][:2]}), tmp_path / "results")
    measured = [x for x in section(text, "Targets").splitlines()[3:] if x.rstrip("| ").endswith("met")]
    assert len(measured) == 2, "the forward pass, today's configuration and the fastest of one"
    for title in ("Correctness", "Ceilings of this machine", "What the hardware counted", "Launch configurations"):
        assert section(text, title).strip() == "Not measured."
    rows = {part: x for part, x in ROWS.items() if part != "machine"}
    assert "464 TFLOP/s; 28.6 times" in page_of(keep(tmp_path / "no_ceiling", rows), tmp_path)
    text = page_of(keep(tmp_path / "nothing", {}, {}), tmp_path / "no_results")
    assert "none, as nothing came back" in text and not list((tmp_path / "no_results").glob("*.json"))
    assert "met |" not in text.replace("met or not |", "")


def test_damage_costs_only_itself_and_is_counted(whole: Path, tmp_path: Path) -> None:
    expected = page_of(whole, tmp_path / "expected")
    path, forward = whole / "parts" / "attention.jsonl", ROWS["attention"][1]
    spoilt = ({**forward, "p50_ms": -1.0}, {**forward, "shape": {"tokens": 197}}, {**forward, "p50_ms": None})
    odd = [json.dumps(x) for x in (*spoilt, [1], {"a": 1}, {"kind": "step", "model": "base"})]
    cut_off = json.dumps(forward)[:-30]
    path.write_bytes(b"\xff\x00 no text\n" + path.read_bytes() + "\n".join([*odd, "[" * 100_000, cut_off]).encode())
    text = page_of(whole, tmp_path / "results")
    assert "- 9 lines could not be read in all." in text and "attention.jsonl, line 1: " in text
    assert section(text, "Targets") == section(expected, "Targets")
    (whole / "summary.json").write_text('{"started": "2026')
    text = page_of(whole, tmp_path / "damaged")
    assert "summary.json is damaged" in text and "Not known: what became of the parts did not come back." in text
    assert section(text, "Targets") == section(expected, "Targets")
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
    harvest = read(whole)
    for rows in ROWS.values():
        for row in {(x["kind"], x.get("fits")): x for x in rows}.values():
            shape = row["shape"] if isinstance(row.get("shape"), dict) else {}
            shapes = ({**shape, "tokens": x, "features": x} for x in (None, 1e200, 10**400))
            for other in [*spoilt(row), *({**row, "shape": shape} for shape in shapes)]:
                (whole / "parts" / "spoilt.jsonl").write_text(json.dumps(other) + "\n")
                found = read(whole)
                assert len(found.damage) <= 1
                page(found, floors, [])
    summary, step = harvest.summary, harvest.outcomes["step_base"]
    for other in [*spoilt(summary), *({**summary, "parts": {"step": x}} for x in spoilt(step))]:
        (whole / "summary.json").write_text(json.dumps(other))
        found = read(whole)
        page(found, floors, [])
        json.dumps(record(found))
        assert 0 < len(name_of(found)) < 100


def pack(folder: Path, source: Path, *others: tuple[tarfile.TarInfo, bytes]) -> Path:
    """The harvest as it comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / harvest_data.ARCHIVE, "w:gz") as tar:
        for path in sorted(source.rglob("*.json*")):
            tar.add(path, str(path.relative_to(source)))
        for member, text in others:
            tar.addfile(member, io.BytesIO(text))
    return folder / harvest_data.ARCHIVE


def test_an_archive_gives_the_same_page_and_cut_off_what_is_whole(whole: Path, tmp_path: Path) -> None:
    packed = pack(tmp_path / "packed" / whole.name, whole)
    assert page_of(packed.parent, tmp_path / "a") == page_of(whole, tmp_path / "b")
    plain = gzip.decompress(packed.read_bytes())
    packed.write_bytes(gzip.compress(plain[: plain.index(b"parts/step.jsonl") + 700]))
    text = page_of(packed.parent, tmp_path / "results")
    assert "harvest.tar.gz cannot be read to its end" in text
    assert line(text, "forward against FlexAttention")[4] == "met"
    assert line(text, "ViT-B, c = 60")[3] == "not measured"


def test_an_archive_cannot_write_elsewhere_or_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvest_data, "LARGEST_MEMBER", 20_000)
    late = (json.dumps(ROWS["attention"][1] | {"way": "late"}) + "\n").encode()
    odd = ["../escaped.jsonl", "/parts/../../x", "parts/step.jsonl/parts/inside.jsonl", "parts/link.jsonl"]
    members = []
    for name, text in (*((x, b"x") for x in odd), ("parts/large.jsonl", b"x" * 20_001), ("parts/zz.jsonl", late)):
        member = tarfile.TarInfo(name)
        member.size = len(text)
        if name == "parts/link.jsonl":
            member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
        members.append((member, text))
    packed = pack(tmp_path, STORED, *members)
    harvest = read(tmp_path)
    assert harvest.damage == [
        *(f"harvest.tar.gz: {name} is no file of a harvest" for name in odd),
        "harvest.tar.gz: parts/large.jsonl is too large (20001 bytes)",
    ]
    assert len(harvest.timings(way="flex")) == 2 and harvest.timings(way="late")
    assert list(tmp_path.rglob("*")) == [packed]


def test_a_record_has_what_all_records_have_and_every_row(whole: Path, tmp_path: Path) -> None:
    first = page_of(whole, tmp_path)
    (path,) = tmp_path.glob("harvest_*.json")
    found = json.loads(path.read_text())
    assert path.name == "harvest_h200_20261201T102030.json"
    assert (found["commit"], found["device"], found["versions"]["triton"]) == ("c0ffee", "NVIDIA H200", "3.6.0")
    assert found["time"] == "2026-12-01T10:20:30+00:00" and found["command"].startswith("python bench/harvest.py")
    assert sum(map(len, found["rows"].values())) == sum(map(len, ROWS.values()))
    assert report_data.collect(tmp_path).left_out == {path.name: "no contest of ways"}
    assert page_of(whole, tmp_path) == first, "the same harvest again changes nothing"
    rows = whole / "parts" / "kmeans.jsonl"
    rows.write_text(rows.read_text().replace("7.0", "6.0"))
    with pytest.raises(FileExistsError, match="records are never changed"):
        page_of(whole, tmp_path)


def test_a_dry_run_measures_nothing(tmp_path: Path) -> None:
    folder = keep(tmp_path / "harvest", ROWS, device="Some CPU", dry_run=True)
    path = report(folder, floors=floors)
    assert path.parent == folder and path.name == "harvest_dry_run_20261201T102030.md"
    text = path.read_text()
    assert "no figure here means anything" in text and "A dry run asks for no change." in text
    assert all(x.endswith("| not measured |  |") for x in section(text, "Targets").splitlines()[4:] if x)


def test_figures_are_written_out() -> None:
    assert [figure(x) for x in (81672.4, 1000.0, 380.25, 0.38, None)] == ["81,672", "1,000", "380.2", "0.38", ""]


def test_two_calls_make_one_page(tmp_path: Path) -> None:
    """In whichever order they are given; each keeps its record, and each figure says its part and call.

    In the first k-means timed out; the second has it, the tuned configurations, and a step that failed.
    """
    rows = {part: x for part, x in ROWS.items() if part != "kmeans"}
    first = keep(tmp_path / "first", rows, {part: outcome() for part in rows} | {"kmeans": outcome("timed out")})
    tuned = [row | {"part": "tuned"} for row in ROWS["configurations"] if row["op"] == "forward"]
    tuned[1] |= {"p20_ms": 0.36, "p50_ms": 0.37, "p80_ms": 0.38}
    configs = {"tuned": True, "configs": {"dq": OTHER._asdict()}}
    steps = [row | {"part": "step_tuned"} | configs for row in ROWS["step"]]
    outcomes = {"kmeans": outcome(), "tuned": outcome(), "step_tuned": outcome("failed", traceback="Error: x")}
    second = keep(
        tmp_path / "second", {"kmeans": ROWS["kmeans"], "tuned": tuned, "step_tuned": steps}, outcomes,
        call=2, started="2026-12-02T10:20:30+00:00", commit="a" * 40, command="python bench/harvest.py --second first",
    )  # fmt: skip
    path = report(second, first, results=tmp_path / "results", floors=floors)
    assert path.name == "harvest_h200_20261202T102030.md"
    text = path.read_text()
    times = "2026-12-01T10:20:30+00:00 and 2026-12-02T10:20:30+00:00"
    assert text.startswith(f"# Harvest of NVIDIA H200, 2 calls, {times}\n")
    assert "- Call 1, NVIDIA H200: commit `c0ffee`" in text and "- Call 2, NVIDIA H200: commit `aaaaaaaaaaaa`" in text
    assert line(text, "forward against FlexAttention")[3].endswith("(0.95 ms beside 0.38 ms, attention, call 1)")
    assert line(text, "k-means, exact, D 4096, K 8192")[3] == "620 TFLOP/s (7 ms, kmeans, call 2)"
    assert line(section(text, "Training step"), "step_tuned, call 2")[-1] == "dq 64x64x4x3"
    # 25 % in the first call, 1 % and within the noise in the second, by as many repeats: the newer pair counts.
    assert line(section(text, "Launch configurations"), "attention_forward")[4] == "1.4%"
    todo = section(text, "What to change first")
    assert "Mend the part step_tuned, call 2: failed." in todo and "kmeans" not in todo and "--second" not in todo
    assert line(section(text, "What failed"), "kmeans, call 1")[1] == "timed out"
    assert "step_tuned, call 2; the whole is `parts.step_tuned` of summary.json" in text
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").glob("*.json"))]
    assert [(x["call"], "kmeans" in x["rows"]) for x in found] == [(1, False), (2, True)]
    alone = page_of(second, tmp_path / "alone")
    assert alone.startswith("# Harvest of NVIDIA H200, second call, ")
    assert "Then the second call" not in alone and "a second call runs it again" not in alone


def test_what_no_page_is_made_of(tmp_path: Path) -> None:
    outcomes = {"machine": outcome("skipped", reason="torch finds no CUDA device"), "kmeans": outcome("skipped")}
    folder = keep(tmp_path / "harvest", {}, outcomes, device=None)
    hung = keep(tmp_path / "hung", {}, {"machine": outcome("timed out"), "kmeans": outcome("failed")}, device=None)
    before = set(RESULTS.iterdir())
    for bad in (folder, hung):
        with pytest.raises(Refused, match="found no GPU and measured nothing"):
            report(bad)
    assert set(RESULTS.iterdir()) == before
    with pytest.raises(Refused, match="a dry run and a real one"):
        report(folder, keep(tmp_path / "dry", {}, outcomes, dry_run=True))
    with pytest.raises(ValueError, match=r"holds no harvest: neither harvest\.tar\.gz nor summary\.json"):
        report(tmp_path, results=tmp_path)


def test_configurations_are_compared_with_todays_where_both_were_timed() -> None:
    """One that lacks a length is not dropped, one that lacks the target is; the second call takes the same one."""
    by_shape = {
        TARGET: {TODAY: 0.4, OTHER: 0.39, SMALL: 0.3},
        Shape(64, 12, 785, 199, 64): {TODAY: 0.5, OTHER: 0.49, Config(16, 16, 4, 1): 0.1},
        Shape(49, 12, 1025, 260, 64): {TODAY: 0.6, OTHER: 0.58, SMALL: 0.5},
    }
    harvest = Harvest(times=[timing("forward", ms, x, shape) for shape, of in by_shape.items() for x, ms in of.items()])
    (found,) = winners(harvest)
    assert (found.best, found.shapes, found.size) == (SMALL, 2, 64) and found.worth_it
    assert found.at_target == pytest.approx(1 / 3) and found.gain == pytest.approx(math.sqrt(4 / 3 * 6 / 5) - 1)
    assert best_configurations(harvest) == {"forward": SMALL._asdict()}


def test_configurations_are_compared_within_one_part_and_dtype() -> None:
    """A candidate is held against today's of its own part: in the other, on a slower device, it would have lost."""
    contests = (({}, 0.4, OTHER, 0.3), ({"part": "tuned"}, 0.8, SMALL, 0.5), ({"dtype": "fp16"}, 0.4, OTHER, 0.2))
    times = [
        timing("forward", ms, config, **more)
        for more, today, other, faster in contests
        for config, ms in ((TODAY, today), (other, faster))
    ]
    bf16, fp16 = winners(Harvest(times=times))
    assert (bf16.best, bf16.gain, fp16.best) == (SMALL, pytest.approx(0.6), OTHER)
    assert best_configurations(Harvest(times=times)) == {"forward": SMALL._asdict()}


def test_too_few_repeats_and_a_gain_within_the_noise_advise_nothing(tmp_path: Path) -> None:
    few = [row | {"repeats": 2} for row in ROWS["configurations"] + ROWS["step"]]
    noisy = [row | {"p20_ms": 0.5 * row["p50_ms"], "p80_ms": 2 * row["p50_ms"]} for row in ROWS["step"]]
    for name, rows, noise in (("few", few, "-"), ("noisy", noisy, "150%")):
        text = page_of(keep(tmp_path / name, {"mixed": rows}), tmp_path / f"{name}_results")
        assert "```python" not in text and "Nothing that came back asks for a change." in text
        assert line(section(text, "Training step"), "step_base")[8] == noise


def test_modes_are_compared_within_one_part_and_batch(tmp_path: Path) -> None:
    """A faster rehearsal of a V100, or a part with another launch table, does not stand in for the step itself."""
    own = [row for row in ROWS["step"] if row["mode"] == "eager" and row["way"] == "ours"]
    fast = next(row for row in ROWS["step"] if row["mode"] == "compiled")
    parts = {"step_volta": {"dtype": "fp16", "batch": 32}, "step_tuned": {"tuned": True}, "step_new": {"batch": 64}}
    others = [
        {**row, "part": part, "images_per_s": speed, **more}
        for (part, more), (row, speed) in product(parts.items(), ((own[0], 100.0), (fast, 9000.0)))
    ]
    found = advice(read(keep(tmp_path / "harvest", {"mixed": own + others})))
    assert [x.text[:48] for x in found] == ["Step of ViT-B (step_new, bf16, batch 64): compil"]


@pytest.mark.slow
def test_floors_are_compiled() -> None:
    pytest.importorskip("triton")
    find = finder("NVIDIA H200")
    found = find("forward", OTHER, TARGET, "bf16")
    assert set(found) == {"tensor cores", "exp2", "issue slots", "L2", "HBM"}
    # The visible pairs alone take the tensor cores 4 x 64 x 297.1 M / (132 x 1.75 GHz x 4096) = 80.4 us.
    assert 80.4 < found["tensor cores"] < 160.8
    assert find("forward", Config(64, 64, 3, 3), TARGET, "bf16") == {}, "no power of two warps: cannot be compiled"
    assert finder("NVIDIA A100")("forward", OTHER, TARGET, "bf16") == {}


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
