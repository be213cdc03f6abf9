"""Comparing records: only what is beyond noise counts, and nothing is compared with something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import compare
from bench.compare import Compare


def timing(median: float, spread: float = 0.02) -> dict[str, float]:
    return {"p20_ms": median * (1 - spread), "p50_ms": median, "p80_ms": median * (1 + spread), "repeats": 9}


def record(tmp_path: Path, name: str, ways: dict[str, dict], **fields) -> Path:
    path = tmp_path / name
    contests = [{"name": "target", "tokens": 197, "ways": {w: {"timings": t} for w, t in ways.items()}}]
    path.write_text(json.dumps({"suite": "attention", "device": "A", "contests": contests} | fields))
    return path


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (timing(10), timing(12), "slower"),
        (timing(12), timing(10), "faster"),
        (timing(10, 0.3), timing(12, 0.3), "same"),  # the ranges overlap
        (timing(10, 0.001), timing(10.2, 0.001), "same"),  # too small
    ],
)
def test_verdicts(old: dict, new: dict, verdict: str) -> None:
    assert compare.judge("x", old, new, 0.03).verdict == verdict


def test_a_slower_way_is_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old = record(tmp_path, "old.json", {"ours": {"forward": timing(10), "backward": timing(20)}, "gone": timing(1)})
    new = record(tmp_path, "new.json", {"ours": {"forward": timing(13), "backward": timing(15)}}, device="B")
    with pytest.raises(SystemExit) as stopped:
        compare.run(Compare(old, new))
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "note: device was A, is B" and len(lines) == 3
    name = "contests [name target tokens 197] ways ours timings"
    assert lines[1].startswith(f"{name} forward") and lines[1].endswith("x1.300  slower")
    assert lines[2].startswith(f"{name} backward") and lines[2].endswith("x0.750  faster")
    compare.run(Compare(old, old))  # nothing slower: no exit


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    old, other = record(tmp_path, "old.json", {"ours": timing(1)}), record(tmp_path, "other.json", {"peer": timing(1)})
    with pytest.raises(ValueError, match="no timing in common"):
        compare.run(Compare(old, other))
    bad = tmp_path / "bad.json"
    for text in ("{", "[1]", '{"a": 1}'):
        bad.write_text(text)
        with pytest.raises(ValueError, match=r"bad.json is no record"):
            compare.run(Compare(old, bad))


def test_the_records_kept_here_have_timings() -> None:
    for path in Path(compare.__file__).with_name("results").glob("step_*.json"):
        names = [name for name, _ in compare.timings(compare.read(path))]
        assert names and all("ours" in name or "official" in name for name in names)
