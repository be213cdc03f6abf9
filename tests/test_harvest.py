"""The harvest: what goes wrong in a part costs that part alone, what was measured comes back, and it ends in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench import harvest
from bench.harvest_data import Harvest
from bench.harvesting import parts as registry
from bench.harvesting.part import Part, read_records

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch):
    """Makes parts of tests/harvest_toys.py by their names."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    return lambda *names, seconds=30.0: [Part(name, f"harvest_toys:{name}", seconds) for name in names]


def gathered(output: Path) -> tuple[dict, dict[str, list[dict]]]:
    """Summary and rows by part, as the archive holds them."""
    with tarfile.open(output / "harvest.tar.gz") as tar:
        tar.extractall(output / "opened", filter="data")
    rows = {path.stem: read_records(path) for path in (output / "opened" / "parts").iterdir()}
    return json.loads((output / "opened" / "summary.json").read_text()), rows


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


BROKEN = {
    "raises": "failed",
    "kills_itself": "killed",
    "segfaults": "killed",
    "exits": "failed",
    "takes_all_memory": "out of memory",
    "takes_all_of_the_gpu": "out of memory",
    "prints_garbage": "ok",
    "not_here": "skipped",
}


def test_a_broken_part_costs_itself_alone(toys, tmp_path: Path) -> None:
    """One after the other, with a sound one at the end: what each measured before its end is there."""
    harvest.run(toys(*BROKEN, "well"), harvest.Call(240, tmp_path, "abc123"))
    summary, rows = gathered(tmp_path)
    found = {name: outcome["status"] for name, outcome in summary["parts"].items()}
    assert found == {**BROKEN, "well": "ok"}
    assert summary["commit"] == "abc123"
    assert all(len(rows[name]) == 1 for name in ("raises", "kills_itself", "prints_garbage"))
    assert rows["well"] == [{"part": "well", "kind": "check", "what": "a toy", "ok": True, "error": None}]
    traceback = summary["parts"]["raises"]["traceback"]
    assert "in raises" in traceback and traceback.count("in deep") == 31 and traceback.endswith("told to its end\n")
    assert summary["parts"]["segfaults"]["returncode"] == -signal.SIGSEGV
    assert "Segmentation fault" in summary["parts"]["segfaults"]["log_tail"]  # with the stack, in harvest.log too
    assert "string_at" in (tmp_path / "harvest.log").read_text(errors="replace")
    assert summary["parts"]["exits"]["returncode"] == 7
    assert summary["parts"]["not_here"]["reason"] == "no such machine"
    assert (tmp_path / "harvest.log").stat().st_size < 1 << 20  # of 6 MiB that were printed


def test_a_part_that_hangs_is_ended_with_its_children(toys, tmp_path: Path) -> None:
    """Deaf to SIGINT, so killed at its limit; the log says where it hung. Children of one that ends well go as well."""
    started = time.monotonic()
    parts = [*toys("leaves_children"), *toys("hangs_with_children", "slow", seconds=10.0), *toys("well")]
    harvest.run(parts, harvest.Call(40, tmp_path))
    assert time.monotonic() - started < 40
    summary, rows = gathered(tmp_path)
    found = {name: outcome["status"] for name, outcome in summary["parts"].items()}
    assert found == {"leaves_children": "ok", "hangs_with_children": "timed out", "slow": "timed out", "well": "ok"}
    hung = summary["parts"]["hangs_with_children"]
    assert hung["returncode"] == -signal.SIGKILL and "harvest_toys.py" in hung["log_tail"]
    assert "KeyboardInterrupt" in summary["parts"]["slow"]["traceback"]
    for name in ("leaves_children", "hangs_with_children"):
        assert not alive(rows[name][0]["pid"])
    assert len(rows["hangs_with_children"]) == 2


def test_time_that_is_left_over_goes_to_later_parts(toys, tmp_path: Path) -> None:
    """And parts of one stage run side by side, one failing without the other."""
    first, broken, last = *toys("well"), *toys("raises"), *toys("not_here")
    stage = [Part(part.name, part.call, 60, "both") for part in (first, broken)]
    summary = harvest.run([*stage, last], harvest.Call(100, tmp_path))
    outcomes = summary["parts"]
    assert [outcomes[name]["status"] for name in ("well", "raises", "not_here")] == ["ok", "failed", "skipped"]
    assert outcomes["well"]["limit"] == outcomes["raises"]["limit"] == pytest.approx(98 * 60 / 90, rel=0.05)
    assert outcomes["not_here"]["limit"] > 98 * 30 / 90 + 20


def test_without_a_gpu_nothing_follows_the_machine(toys, tmp_path: Path) -> None:
    """And a second call does again what was not begun. A dry run needs no GPU."""
    parts = [Part("machine", "harvest_toys:not_here", 10), *toys("well")]
    summary = harvest.run(parts, harvest.Call(60, tmp_path / "none", number=2, command="the command"))
    assert harvest.no_gpu(summary) and (summary["call"], summary["command"]) == (2, "the command")
    well = summary["parts"]["well"]
    assert (well["status"], well["seconds"], well["returncode"]) == ("skipped", 0.0, None)
    again = registry.second(Harvest({"parts": {**summary["parts"], "kmeans": well}}))
    assert [part.name for part in again].count("kmeans") == 1
    summary = harvest.run(parts, harvest.Call(60, tmp_path / "dry", dry=True))
    assert summary["parts"]["well"]["status"] == "ok" and not harvest.no_gpu(summary)


def refused(*arguments: object) -> str:
    """The one line of a command that begins nothing."""
    command = [sys.executable, str(ROOT / "bench/harvest.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_a_harvest_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / harvest.ARCHIVE).write_bytes(b"evidence")
    for arguments in (["--output", tmp_path], ["--dry-run", "--second", tmp_path, "--output", tmp_path]):
        assert "holds a harvest already (harvest.tar.gz)" in refused(*arguments)
    unpacked = tmp_path / "unpacked"
    (unpacked / "parts").mkdir(parents=True)
    (unpacked / "summary.json").write_text('{"parts": {}}')
    assert "holds a harvest already (summary.json)" in refused("--second", unpacked, "--output", unpacked)
    assert (tmp_path / harvest.ARCHIVE).read_bytes() == b"evidence" and len(list(unpacked.iterdir())) == 2


def test_a_harvest_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    nowhere, new = tmp_path / "nowhere", tmp_path / "new"
    for arguments in (["--report", nowhere], ["--second", nowhere, "--output", new]):
        assert f"{nowhere} holds no harvest: neither harvest.tar.gz nor summary.json" in refused(*arguments)
    nowhere.mkdir()
    (nowhere / harvest.ARCHIVE).write_bytes(b"cut off")
    assert f"the harvest in {nowhere} cannot be read: harvest.tar.gz cannot be read to its end: ReadError" in refused(
        "--second", nowhere, "--output", new
    )
    assert not new.exists()


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1", "0", "1e9"])
def test_minutes_are_a_number_that_a_call_can_take(minutes: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench/harvest.py"), f"--minutes={minutes}", "--output", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "--minutes must be more than 0.1, at most 120" in done.stderr
    assert not list(tmp_path.iterdir())


def stopped(tmp_path: Path, number: int) -> tuple[dict, list[dict]]:
    """Statuses by part, and rows of the part that hung, of a harvest that gets a signal while that part runs."""
    code = (
        "from pathlib import Path; from bench import harvest; from bench.harvesting.part import Part\n"
        "parts = [Part(n, f'harvest_toys:{n}', 100) for n in ('well', 'hangs_with_children', 'raises')]\n"
        f"harvest.run(parts, harvest.Call(600, Path({str(tmp_path)!r})))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    latest = time.monotonic() + 60
    while not (begun := list(tmp_path.glob("*/parts/hangs*"))) or len(rows := read_records(begun[0])) < 2:
        assert process.poll() is None and time.monotonic() < latest
        time.sleep(0.1)
    process.send_signal(number)
    process.wait(30)
    summary, _ = gathered(tmp_path)
    return {name: outcome["status"] for name, outcome in summary["parts"].items()}, rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_harvest_that_is_stopped_packs_what_it_has(tmp_path: Path, number: int) -> None:
    """As `timeout` or Ctrl-C do it: the part that runs is ended and told, the others are skipped."""
    found, rows = stopped(tmp_path, number)
    assert found == {"well": "ok", "hangs_with_children": "timed out", "raises": "skipped"}
    assert not any(alive(row["pid"]) for row in rows)


def test_a_harvest_that_is_killed_leaves_what_it_had_and_no_part_behind(tmp_path: Path) -> None:
    found, (grandchild, part) = stopped(tmp_path, signal.SIGKILL)
    os.kill(grandchild["pid"], signal.SIGKILL)
    assert found == {"well": "ok"}
    latest = time.monotonic() + 20
    while alive(part["pid"]):
        assert time.monotonic() < latest
        time.sleep(0.1)


def test_a_process_that_does_not_go_costs_no_figure(toys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one that is stuck in a driver: it has no return code, even when it was killed."""
    real = subprocess.Popen.wait

    def stuck(process, timeout=None):
        if timeout is not None:
            real(process, timeout)
            process.returncode = None
            raise subprocess.TimeoutExpired(process.args, timeout)
        return real(process)

    monkeypatch.setattr(subprocess.Popen, "wait", stuck)
    monkeypatch.setattr(subprocess.Popen, "poll", lambda process: None)
    summary = harvest.run(toys("well", seconds=6.0), harvest.Call(20, tmp_path))
    assert summary["parts"]["well"]["returncode"] is None
    _, rows = gathered(tmp_path)
    assert rows["well"]


def test_where_nothing_can_be_written_all_is_kept(toys, monkeypatch, capsys, tmp_path: Path) -> None:
    def full(path: Path, write) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(harvest, "replaced", full)
    monkeypatch.setattr(harvest.tempfile, "tempdir", str(tmp_path))
    summary = harvest.run(toys("well"), harvest.Call(60, tmp_path / "output"))
    assert summary["parts"]["well"]["status"] == "ok"
    assert "No space left on device" in capsys.readouterr().out
    (kept,) = tmp_path.glob("harvest-kept-*")
    assert read_records(kept / "parts" / "well.jsonl") and (kept / "summary.json").exists()


def test_a_real_harvest_does_not_interpret_its_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    part = Part("any", "x:y", 1.0, kernels=True)
    real, dry = (harvest.environment(part, harvest.Call(1, tmp_path, dry=dry), tmp_path) for dry in (False, True))
    assert "TRITON_INTERPRET" not in real and dry["TRITON_INTERPRET"] == "1"
    assert str(Path("somewhere").resolve()) in real["PYTHONPATH"].split(os.pathsep)


def test_signals_without_a_name_are_told_by_their_number() -> None:
    assert [harvest.signal_name(number) for number in (9, 40)] == ["SIGKILL", "signal 40"]
