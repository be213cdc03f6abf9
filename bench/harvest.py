"""One command that brings all evidence home from a GPU: python bench/harvest.py --minutes 6 --output DIR

Every part (bench/harvesting/parts.py) is a process with a time limit of its own, so that none costs another anything:
at its limit it is interrupted, then killed with all its children, and the next follows. What a part ends early goes to
those after it. After each part DIR, which must not hold a harvest yet, has what there is by then:

    harvest.tar.gz  parts/NAME.jsonl, a line as each figure is measured; summary.json, what became of each part
    harvest.log     what the parts printed, tracebacks and stacks of those that hung included
    ncu.csv         Nsight Compute's report
    profile.txt     the profiler's table of a step

`--second DIR` is the second call: what failed in the first, whose DIR this is, the tuned configurations, what a V100
would run, compute-sanitizer. `--parts tune` times all tiles that can work; `--dry-run` takes every part on a CPU.
`--report DIR [SECOND]` makes a record and a page of what came back, of both calls together where both are given; it
writes them into bench/results/, or of a dry run into its DIR. Needs a Python with torch, triton and numpy, and this
checkout; this process itself needs none of them. The exit code is 0 where all went well, 1 where a part failed or
nothing was measured, 2 where nothing was begun.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.harvest_data import ARCHIVE, Refused, read  # noqa: E402  the checkout is on the path only now
from bench.harvesting import parts as registry  # noqa: E402
from bench.harvesting.part import (  # noqa: E402
    FAILED,
    KILLED,
    OK,
    SKIPPED,
    TIMED_OUT,
    Part,
    end_file,
    read_records,
    ready_file,
    records_file,
)  # fmt: skip

LARGEST_FILE = 15 << 20
"""Bytes of a file that comes back."""
LARGEST_RECORDS, LARGEST_LOG = 4 << 20, 256 << 10
"""Bytes of one part's records, and of what it printed, that come back."""
LOG_TAIL = 4000
"""Characters of a part's log that its summary holds."""
GRACE = 5.0
"""Seconds between SIGINT and SIGKILL, or a fifth of a part's limit where that is less."""
READY_SHARE = 0.1
"""Of a call, that the imports of a stage may take before its slice begins."""
LAST_WAIT = 2.0
"""Seconds to wait for a process that was killed."""
POLL = 0.05
MOST_MINUTES = 120
"""Of a call; more is a slip."""


@dataclass(frozen=True)
class Call:
    """One call of the command. seconds: that the whole may take, from `began`. number: 2 of a second call."""

    seconds: float
    output: Path
    commit: str = ""
    dry: bool = False
    number: int = 1
    command: str = ""
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds left for parts; what packing takes is set apart."""
        return self.began + self.seconds - max(2.0, 0.02 * self.seconds) - time.monotonic()


class Process:
    """A part's process, started ahead of its turn, and what became of it."""

    def __init__(self, part: Part, call: Call, work: Path) -> None:
        self.part, self.work, self.log = part, work, work / "logs" / f"{part.name}.log"
        self.limit = self.seconds = 0.0
        self.started = self.stopped = False
        task = {"name": part.name, "call": part.call, "arguments": dict(part.arguments)}
        task |= {"folder": str(work), "dry": call.dry}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.harvesting.child", json.dumps(task)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, process_group=0,
                env=environment(part, call, work),
            )  # fmt: skip

    def start(self, limit: float) -> None:
        """Let it begin; it knows that it is interrupted a grace before `limit` seconds, and plans to end earlier."""
        self.began, self.limit, self.started = time.monotonic(), limit, True
        self.grace = min(GRACE, limit / 5)
        with suppress(BrokenPipeError):  # where it has died already, its return code says how
            self.process.stdin.write(f"{0.95 * (limit - self.grace)} {limit - self.grace}\n".encode())
            self.process.stdin.close()

    def ready(self) -> bool:
        """Whether it has imported what it needs, or never will."""
        return ready_file(self.work, self.part.name).exists() or self.process.poll() is not None

    def poll(self) -> bool:
        """Whether it has ended; sends the signals that are due. What it left running in its group is killed."""
        if self.process.poll() is None:
            spent = time.monotonic() - self.began
            if spent < self.limit:
                if spent >= self.limit - self.grace and not self.stopped:
                    self.stopped = True
                    self.signal(signal.SIGINT)
                return False
            self.stopped = True
        self.kill(time.monotonic() + LAST_WAIT)
        return True

    def kill(self, latest: float) -> None:
        """End it now, with all it started, and wait for it until `latest`."""
        self.signal(signal.SIGKILL)
        # In the driver's hands it may not go; the next part starts all the same.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, latest - time.monotonic()))
        self.seconds = time.monotonic() - self.began if self.started else 0.0

    def signal(self, number: int) -> None:
        """To the whole process group, if anything of it is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def outcome(self) -> dict[str, Any]:
        """Its entry of the summary."""
        if not self.started:  # it was killed, which tells nothing of its part
            return outcome(SKIPPED, "the harvest ended before this part's turn")
        code, told = self.process.returncode, end_file(self.work, self.part.name)
        if told.exists():
            end = json.loads(told.read_text())
        elif self.stopped or code is None:
            end = {
                "status": TIMED_OUT,
                "reason": "killed at its limit" if code is not None else "killed, and did not go",
            }
        elif code < 0:
            end = {"status": KILLED, "reason": f"killed by {signal_name(-code)}"}
        else:
            end = {"status": FAILED, "reason": f"ended with exit code {code} without a word"}
        tail = clipped(self.log, LARGEST_LOG).decode(errors="replace")[-LOG_TAIL:]
        spent = {"seconds": round(self.seconds, 2), "limit": round(self.limit, 2), "returncode": code}
        return outcome(**end) | spent | {"log_tail": tail}


def outcome(status: str, reason: str | None, traceback: str | None = None) -> dict[str, Any]:
    """The entry of a part in the summary; of one that never began, but for what `Process.outcome` adds."""
    return {
        "status": status, "seconds": 0.0, "limit": 0.0, "returncode": None, "reason": reason, "traceback": traceback,
        "log_tail": "",
    }  # fmt: skip


def signal_name(number: int) -> str:
    """SIGKILL for 9; real-time signals have numbers only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def environment(part: Part, call: Call, work: Path) -> dict[str, str]:
    """Variables of a part's process: the checkout on its path, kernels interpreted in a dry run and only there."""
    given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = [str(work / "path"), str(ROOT), *given]
    added = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **part.environment}
    if call.dry:
        added |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        added |= {"TRITON_INTERPRET": "1"} if part.kernels else {}
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | added


def run(parts: Sequence[Part], call: Call) -> dict[str, Any]:
    """Run the parts in their order, bring home what there is, and return the summary.

    SIGTERM, SIGHUP or Ctrl-C stop the part that runs; those after it are skipped, and all is packed as ever.
    """
    summary: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "commit": call.commit or commit(), "device": None,
        "versions": {}, "command": call.command, "call": call.number, "minutes": call.seconds / 60,
        "dry_run": call.dry, "parts": {},
    }  # fmt: skip
    call.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="harvest-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        for name in ("parts", "ends", "logs", "path"):
            (work / name).mkdir()
        (work / "path" / "mapet_kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
        waiting: list[Process] = []
        end_by(signal.default_int_handler)
        try:
            run_stages(parts, call, work, waiting, summary)
        except KeyboardInterrupt:
            print("interrupted: packing what there is", flush=True)
            end_by(signal.SIG_IGN)
        finally:
            stop(waiting)
            for process in waiting:
                interrupted = {"status": TIMED_OUT, "reason": "the harvest was interrupted"}
                summary["parts"][process.part.name] = process.outcome() | (interrupted if process.started else {})
            for part in parts:
                summary["parts"].setdefault(part.name, outcome(SKIPPED, "no time was left for it"))
            if not pack(summary, call, work):
                kept = tempfile.mkdtemp(prefix="harvest-kept-")
                shutil.copytree(work, kept, symlinks=True, dirs_exist_ok=True)
                print(f"harvest: all of it is kept in {kept}", flush=True)
    return summary


def run_stages(parts: Sequence[Part], call: Call, work: Path, waiting: list[Process], summary: dict[str, Any]) -> None:
    """Each stage in its slice of what is left; a dry run, on few cores, takes one part after the other, in like slices.

    `waiting` holds the processes that have not ended, for the caller to end. Without a GPU nothing follows the machine.
    """
    stages = [list(x) for _, x in groupby(parts, key=lambda part: (not call.dry and part.stage) or part.name)]
    for number, stage in enumerate(stages):
        present = {process.part.name for process in waiting}
        waiting += [Process(part, call, work) for part in stage if part.name not in present]
        latest = time.monotonic() + READY_SHARE * call.seconds
        while not all(process.ready() for process in waiting) and time.monotonic() < latest:
            time.sleep(POLL)
        slices = [1.0 if call.dry else max(part.seconds for part in each) for each in stages[number:]]
        limit = call.left() * slices[0] / sum(slices)
        if limit < 1:
            return
        for process in waiting:
            process.start(limit)
        running = list(waiting)
        if number + 1 < len(stages):
            waiting += [Process(part, call, work) for part in stages[number + 1]]
        while running:
            for process in [process for process in running if process.poll()]:
                running.remove(process)
                waiting.remove(process)
                summary["parts"][process.part.name] = process.outcome()
                tell(process, summary, call)
            time.sleep(POLL)
        pack(summary, call, work)
        if no_gpu(summary):
            return


def no_gpu(summary: dict[str, Any]) -> bool:
    """Whether the machine has no GPU; a dry run needs none."""
    return not summary["dry_run"] and summary["parts"].get(registry.MACHINE, {}).get("status") == SKIPPED


def stop(processes: Sequence[Process]) -> None:
    """Interrupt those that run, so that they say where they were, then end all."""
    for process in processes:
        process.signal(signal.SIGINT)
    latest = time.monotonic() + LAST_WAIT / 2
    while time.monotonic() < latest and any(process.process.poll() is None for process in processes):
        time.sleep(POLL)
    for process in processes:
        process.signal(signal.SIGKILL)  # all at once: what does not go is waited for together
    latest = time.monotonic() + LAST_WAIT
    for process in processes:
        process.kill(latest)


def tell(process: Process, summary: dict[str, Any], call: Call) -> None:
    """A line for whoever watches."""
    name, spent = process.part.name, time.monotonic() - call.began
    found, rows = summary["parts"][name], len(read_records(records_file(process.work, name)))
    ended = f"{found['status']} after {found['seconds']:.1f} of {found['limit']:.1f} s, {rows} figures"
    print(f"[{spent:5.1f} s] {name}: {ended}{': ' if found['reason'] else ''}{found['reason'] or ''}", flush=True)


def end_by(handler: Any) -> None:
    """What SIGTERM, SIGHUP and Ctrl-C do: raise KeyboardInterrupt, or nothing."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def pack(summary: dict[str, Any], call: Call, work: Path) -> bool:
    """Write what comes back, each file whole or not at all, so that a call killed later leaves what it had.

    Where it cannot be written, that is said, and the parts go on: the folder may have room later.
    """
    rows = read_records(records_file(work, registry.MACHINE))
    machine = next((row for row in rows if row["kind"] == "machine"), {})
    summary |= {"device": machine.get("device"), "versions": machine.get("versions", {})}
    try:
        (work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        replaced(call.output / ARCHIVE, lambda draft: pack_records(draft, work))
        logs = sorted((work / "logs").iterdir(), key=lambda path: path.stat().st_mtime)
        texts = {"harvest.log": b"".join(b"==== %s\n%s\n" % (x.stem.encode(), clipped(x, LARGEST_LOG)) for x in logs)}
        texts |= {x: clipped(work / x, LARGEST_FILE) for x in ("ncu.csv", "profile.txt") if (work / x).exists()}
        for name, text in texts.items():
            replaced(call.output / name, lambda draft, text=text: draft.write_bytes(text))
    except OSError as error:
        print(f"harvest: what there is could not be written to {call.output}: {error}", flush=True)
        return False
    return True


def replaced(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a draft beside `path`, and put it there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    write(draft)
    draft.replace(path)


def pack_records(archive: Path, work: Path) -> None:
    """summary.json and the records of every part, up to LARGEST_RECORDS; a line that was cut costs itself alone."""
    with tarfile.open(archive, "w:gz") as tar:
        for path in [work / "summary.json", *sorted((work / "parts").glob("*.jsonl"))]:
            text, member = clipped(path, LARGEST_RECORDS), tarfile.TarInfo(path.relative_to(work).as_posix())
            member.size, member.mtime = len(text), int(path.stat().st_mtime)
            tar.addfile(member, io.BytesIO(text))


def clipped(path: Path, most: int) -> bytes:
    """A file's bytes, of more than `most` the first fourth and the last three fourths of them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= most:
            return file.read()
        first = file.read(most // 4)
        file.seek(size - 3 * most // 4)
        return first + f"\n[{size - most} bytes left out]\n".encode() + file.read()


def commit() -> str:
    """The checkout's commit: a file COMMIT, where there is one, or what git says; empty where neither knows."""
    if (ROOT / "COMMIT").exists():
        return (ROOT / "COMMIT").read_text().strip()
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return ""
    return answer.stdout.strip()


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, options in {
        "--minutes": {"type": float, "help": f"the whole ends before, at most {MOST_MINUTES} (default 6)"},
        "--output": {"type": Path, "help": "folder for what comes back, without a harvest in it"},
        "--commit": {"help": "of the checkout, where git and a file COMMIT are missing"},
        "--second": {"type": Path, "help": "second call, after the one whose output this is"},
        "--parts": {"nargs": "+", "help": "these parts alone; an unknown name lists them"},
        "--report": {"type": Path, "nargs": "+", "help": "a record and a page of what came back, of one or both calls"},
    }.items():
        metavar = {"--minutes": "MINUTES", "--commit": "COMMIT", "--parts": "NAME"}.get(name, "DIR")
        parser.add_argument(name, metavar=metavar, **options)
    parser.add_argument("--dry-run", action="store_true", help="every part on a CPU, small")
    parser.set_defaults(minutes=6.0, commit="")
    given = parser.parse_args()
    if given.report is None and given.output is None:
        parser.error("give --output DIR, or --report DIR")
    if not 0.1 < given.minutes <= MOST_MINUTES:  # nan is in no range
        parser.error(f"--minutes must be more than 0.1, at most {MOST_MINUTES}, got {given.minutes:g}")
    return given


def chosen(given: argparse.Namespace) -> list[Part]:
    """The parts of the call.

    Raises:
        Refused: a part is not known, or the first call cannot be read.
    """
    parts = list(registry.FIRST)
    if given.second is not None:
        first = read(given.second)
        if not first.summary:
            raise Refused(f"the harvest in {given.second} cannot be read: {' '.join(first.damage[0].split())}")
        parts = registry.second(first)
    if given.parts is None:
        return parts
    parts += registry.ALONE
    if unknown := set(given.parts) - {part.name for part in parts}:
        known = ", ".join(part.name for part in parts)
        raise Refused(f"unknown parts {', '.join(sorted(unknown))}; there are {known}")
    return [part for part in parts if part.name in given.parts]


def measure(given: argparse.Namespace) -> int:
    """Run the parts and tell what became of them; returns the exit code.

    Raises:
        Refused: nothing was begun, as with a folder that has what an earlier call brought home.
    """
    if held := [name for name in (ARCHIVE, "summary.json", "parts") if (given.output / name).exists()]:
        raise Refused(
            f"{given.output} holds a harvest already ({held[0]}), which is never replaced; give another --output"
        )
    parts, command = chosen(given), shlex.join(["python", "bench/harvest.py", *sys.argv[1:]])
    number = 1 if given.second is None else 2
    summary = run(parts, Call(60 * given.minutes, given.output, given.commit, given.dry_run, number, command))
    found = [outcome["status"] for outcome in summary["parts"].values()]
    bad = len(found) - found.count(OK) - found.count(SKIPPED)
    print(f"{found.count(OK)} parts ok, {found.count(SKIPPED)} skipped, {bad} failed: {given.output}/{ARCHIVE}")
    if no_gpu(summary):
        reason = summary["parts"][registry.MACHINE]["reason"]
        print(f"harvest: {reason}, so nothing was measured; --dry-run goes through it on a CPU", file=sys.stderr)
    return 1 if bad or OK not in found else 0


def main() -> int:
    """The command; returns its exit code."""
    given = arguments()
    try:
        if given.report is None:
            return measure(given)
        from bench.harvest_report import report

        print(report(*given.report))
        return 0
    except (Refused, FileExistsError) as error:
        print(f"harvest: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
