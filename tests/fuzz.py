"""A fuzz of the command line: damaged folders and absurd options, and what must hold whatever they are.

    python tests/fuzz.py --cases 5000 --seed 1 --output bench/results   # half an hour of one core; a record
    python tests/fuzz.py --replay '{"damages": [], "arguments": ["doctor"]}'

A case changes a copy of a small world (fuzz_world.py) and runs one command in it (fuzz_cases.py), in this process or in
one of its own. After it the exit code is 0, 1, 2 or 130, there was no traceback and no hang, an error is one line, what
is printed is harmless, no code in a file ran, and no file is lost that the command had no business to replace.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from fuzz_cases import Case, draw_case
from fuzz_world import copy, files_of, inflict, make_world, snapshot, users

from mapet import cli
from mapet.commands import doctor
from mapet.commands.pretrain import run_config
from mapet.errors import MapetError
from mapet_kernels.selfcheck import Agreement

LIMIT = 60
"""Seconds that a command may take, on a machine with other work to do."""
MEMORY = 6 * 2**30
"""Bytes of address space that a command may add: absurd sizes are to fail, not to bring the machine down."""
CODES = (0, 1, 2, 130)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
PASSING = re.compile(r"(^|/)(\.mapet\.lock|\.[^/]*\.(partial|replaced)|\.partial_[^/]*|\.removed_[^/]*)(/|$)")
"""Locks, and what is unfinished: it comes and goes."""


class Hang(BaseException):
    """A command took too long."""


@dataclass
class Outcome:
    """What a command did."""

    code: int = 0
    out: str = ""
    err: str = ""
    trace: str = ""
    hung: bool = False
    seconds: float = 0.0


@dataclass
class Tally:
    """All cases so far."""

    cases: Counter = field(default_factory=Counter)
    codes: Counter = field(default_factory=Counter)
    problems: Counter = field(default_factory=Counter)
    failing: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0
    processes: int = 0

    def count(self, case: Case, outcome: Outcome, problems: list[str], process: bool) -> None:
        self.cases[case.command] += 1
        self.codes[str(outcome.code)] += 1
        self.processes += process
        self.slowest = max(self.slowest, outcome.seconds)
        self.problems.update({problem.split(":")[0] for problem in problems})
        if problems:
            self.failing.append({"case": json.loads(case.to_json()), "process": process, "problems": problems})


class Fuzz:
    """The world, made once, and the cases run in copies of it."""

    def __init__(self, base: Path) -> None:
        self.pristine = make_world(base / "pristine")
        self.users = users(self.pristine)
        self.files = files_of(self.pristine)
        self.base, self.canary = base / "case", base / "canary"

    def case(self, start: int, number: int) -> Case:
        """A case, the same for the same two numbers."""
        return draw_case(self.files, random.Random(f"{start} {number}"))

    def check(self, case: Case, *, process: bool = False, tally: Tally | None = None) -> list[str]:
        """Run a case and count it; everything that did not hold, in words."""
        shutil.rmtree(self.base, ignore_errors=True)
        world = self.base / "world"
        self.base.mkdir()
        copy(self.pristine, world)
        for damage in case.damages:
            inflict(world, damage, self.canary)
        before = snapshot(self.base)
        with inside(world):
            written = outputs(case.arguments)
            outcome = run_process(case.arguments, world) if process else run_here(case.arguments)
        problems = list(self.judge(case, outcome, before, snapshot(self.base), written))
        if tally is not None:
            tally.count(case, outcome, problems, process)
        return problems

    def judge(
        self, case: Case, outcome: Outcome, before: dict[str, str], after: dict[str, str], written: Written
    ) -> Iterator[str]:
        if outcome.hung:
            yield f"hang: {outcome.trace}"
        elif outcome.trace or "Traceback" in outcome.out + outcome.err:
            yield f"traceback: {outcome.trace or outcome.err[-2000:]}"
        elif outcome.code not in CODES:
            yield f"message: exit code {outcome.code}: {outcome.err[-500:]}"
        else:
            yield from wrong_message(case.command, outcome)
        if self.canary.exists():
            self.canary.unlink()
            yield "code: code in a file was run"
        yield from lost_files(outcome, before, after, written, self.users)
        yield from new_files(case.command, outcome, before, after, written)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder; the command line's default places are relative."""
    earlier = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(earlier)


def run_here(arguments: tuple[str, ...]) -> Outcome:
    """The command in this process, with a limit on time and memory, and without what is slow in doctor."""
    outcome, out, err = Outcome(), io.StringIO(), io.StringIO()
    start = time.monotonic()
    quick = mock.patch.multiple(doctor, two_stream_agreement=lambda *_: Agreement(0.0, 0.0), OPTIONAL_PACKAGES={})
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quick, limited():
        try:
            outcome.code = cli.main(list(arguments))
        except SystemExit as stop:
            outcome.code = stop.code if isinstance(stop.code, int) else 1
        except Hang:
            outcome.hung, outcome.trace = True, traceback.format_exc(limit=-6)
        except BaseException:  # whatever it is, it is what a user would see
            outcome.trace = traceback.format_exc(limit=-6)
    outcome.out, outcome.err, outcome.seconds = out.getvalue(), err.getvalue(), time.monotonic() - start
    return outcome


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A block that takes too long is interrupted, or, where it cannot be, ends the process with all its stacks."""

    def interrupt(*_: object) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    faulthandler.dump_traceback_later(4 * LIMIT, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def run_process(arguments: tuple[str, ...], world: Path) -> Outcome:
    """The command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mapet", *arguments],
            cwd=world,
            env=environment,
            capture_output=True,
            timeout=4 * LIMIT,
        )
    except subprocess.TimeoutExpired:
        return Outcome(hung=True, trace="in a process of its own", seconds=time.monotonic() - start)
    out, err = (text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr))
    return Outcome(done.returncode, out, err, seconds=time.monotonic() - start)


def wrong_message(command: str, outcome: Outcome) -> Iterator[str]:
    """An error is one line, the last, or a box of the parser of options; a name's control characters are not obeyed."""
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("mapet: error")]
    parser = outcome.code == 2 and "For full helptext" in outcome.err
    told = parser or (command == "doctor" and outcome.code == 1 and "problem" in outcome.out)  # a report is no error
    if outcome.code in (1, 2) and not told and (len(errors) != 1 or lines[-1] != errors[0]):
        yield f"message: exit code {outcome.code} without an error of one line: {outcome.err[-1000:]}"
    if outcome.code == 0 and errors:
        yield f"message: exit code 0 with an error: {errors[0]}"
    for name, text in (("stdout", outcome.out), ("stderr", "" if parser else outcome.err)):
        if found := CONTROL.search(text):
            yield f"message: {name} has {found[0]!r}: {text[max(0, found.start() - 100) : found.start() + 100]!r}"


@dataclass(frozen=True)
class Written:
    """Where a command writes, relative to the case's folder, and what settles whether it may replace what is there."""

    output: str | None = None
    tokenizer: str | None = None
    features: str | None = None
    overwrite: bool = False
    fresh: bool = False
    ours: bool = False
    """Whether what stands at `output` carries the mark of this command's earlier output."""
    command: str = ""


def outputs(arguments: tuple[str, ...]) -> Written:
    """Of a command line, before it runs; nothing is written where it cannot be parsed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command, options = cli.parse(list(arguments))
            output = run_config(options).train.output if command == "pretrain" else getattr(options, "output", None)
    except (SystemExit, MapetError, OSError, ValueError):
        return Written()
    if output is None or command in ("plan", "doctor"):
        return Written(command=command)
    tokenizer = features = None
    if command == "tokenize" and output.name:
        tokenizer = options.codebook or output.with_name(f"{output.name}_tokenizer")
        features = options.features_dir
    return Written(
        *(path and relative(path) for path in (output, tokenizer, features)),
        overwrite=getattr(options, "overwrite", False),
        fresh=getattr(options, "fresh", False),
        ours=is_ours(command, output),
        command=command,
    )


def relative(path: Path) -> str:
    """To the folder of the case, where links lead."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.relpath(os.path.realpath(path), os.path.realpath(".."))
    return str(path)


def is_ours(command: str, output: Path) -> bool:
    """Whether a folder that this command wrote is there, by what it says of itself."""
    marks = {
        "export": ("config.json", b'"producer": "mapet"'),
        "codebook": ("report.md", b"<!-- Written by mapet codebook"),
        "probe": ("scores.json", b'"results"'),
        "tokenize": ("manifest.json", b'"shards"'),
        "pretrain": ("checkpoints", b""),
    }
    name, mark = marks.get(command, ("", b""))
    try:
        path = output / name
        return path.is_dir() if not mark else path.is_file() and mark in path.read_bytes()
    except (OSError, ValueError):
        return False


STEP = r"checkpoints/step_\d+"
REPLACED: Mapping[str, str] = {
    "tokenize": r"(manifest|names)\.json|(labels|tokens|images_\d+)\.npy",
    "pretrain": rf"metrics\.jsonl|budget\.json|failed_step_\d+\.json|{STEP}(/[a-z]+\.(safetensors|pt|json))?",
    "probe": r"scores\.json|features/features_[0-9a-f]+\.(npy|json)",
    "codebook": r"report\.md|(usage|classes)\.csv|(usage|most_used|least_used|chosen|classes)\.png",
    "export": r"config\.json|model\.safetensors",
}
"""What a command may replace in the folder that it writes, where that is its own."""
FEATURE_FILES = r"(plan|features)\.json|part_\d+\.json|features_\d+\.npy|kmeans"
TOKENIZER_FILES = rf"tokenizer\.json|codebook\.safetensors|fit(/({FEATURE_FILES}))?"


def may_replace(path: str, outcome: Outcome, written: Written) -> bool:
    """Whether a command that ended so may have replaced or removed this file."""
    if PASSING.search(path):
        return True
    command, done = written.command, outcome.code == 0
    if command == "tokenize":
        if is_in(path, written.tokenizer, TOKENIZER_FILES):
            return "/fit" in path or (done and written.overwrite)
        if is_in(path, written.features, FEATURE_FILES):
            return True
        done = done and written.overwrite
    # A run that fails in the end has trained all the same.
    ended = outcome.code in (0, 1, 130) if command == "pretrain" else done
    return ended and written.ours and is_in(path, written.output, REPLACED.get(command, "(?!)"))


def is_in(path: str, folder: str | None, pattern: str) -> bool:
    """Whether a path is in a folder, under a name that fits."""
    return folder is not None and re.fullmatch(f"{re.escape(folder)}/({pattern})", path) is not None


def lost_files(
    outcome: Outcome, before: dict[str, str], after: dict[str, str], written: Written, users: frozenset[str]
) -> Iterator[str]:
    """Files that are gone or changed and may not be: a user's never, others only where the command replaces them."""
    changed = [path for path, what in before.items() if after.get(path) != what]
    moved = Counter(after[path] for path in after if before.get(path) != after[path] and "/before_" in path)
    for path in changed:
        what = before[path]
        aside = written.fresh and written.output is not None and path.startswith(f"{written.output}/")
        if aside and moved[what] > 0:
            moved[what] -= 1
        elif what in users or not may_replace(path, outcome, written):
            yield f"lost: {path} {'is changed' if path in after else 'is gone'} (exit code {outcome.code})"


def new_files(
    command: str, outcome: Outcome, before: dict[str, str], after: dict[str, str], written: Written
) -> Iterator[str]:
    """What has come to be where the command has nothing to write, or though it was refused."""
    for path in after.keys() - before.keys():
        if PASSING.search(path):
            continue
        homes = [written.output, written.tokenizer, written.features]
        if outcome.code == 1:  # what a command keeps that failed, to go on from
            kept = {"tokenize": homes[1:], "pretrain": homes[:1], "probe": [f"{written.output}/features"]}
            homes = kept.get(command, [])
        elif outcome.code == 2:
            homes = []
        folders = [home for home in homes if home]
        if not any(path == home or path.startswith(f"{home}/") or home.startswith(f"{path}/") for home in folders):
            yield f"left: {path} is new (exit code {outcome.code})"


def simplest(fuzz: Fuzz, case: Case, problems: list[str]) -> Case:
    """A case without the damages and arguments that a problem of the same kind does not need."""
    kinds = {problem.split(":")[0] for problem in problems}
    for name in ("damages", "arguments"):
        for i in reversed(range(name == "arguments", len(getattr(case, name)))):
            parts = getattr(case, name)
            less = dataclasses.replace(case, **{name: parts[:i] + parts[i + 1 :]})
            if kinds & {problem.split(":")[0] for problem in fuzz.check(less)}:
                case = less
    return case


def main() -> int:
    """Run the cases, tell what does not hold as it is found, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="how many to draw")
    parser.add_argument("--seed", type=int, default=1, help="what they are drawn from")
    parser.add_argument("--every", type=int, default=50, help="one of so many runs in a process of its own; 0 for none")
    parser.add_argument("--output", type=Path, help="folder for the record")
    parser.add_argument("--replay", help="a case as JSON, as a failure is printed, instead")
    parser.add_argument("--process", action="store_true", help="replay it in a process of its own")
    options = parser.parse_args()
    began, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        if options.replay:
            problems = fuzz.check(Case.from_json(options.replay), process=options.process)
            print("\n".join(problems) or "all holds")
            return int(bool(problems))

        for number in range(1, options.cases + 1):
            case = fuzz.case(options.seed, number)
            process = bool(options.every) and number % options.every == 0 and "\0" not in "".join(case.arguments)
            if problems := fuzz.check(case, process=process, tally=tally):
                for problem in problems:
                    print(f"case {number}: {problem}\n    {case.to_json()}", flush=True)
                if not process and "hang" not in tally.failing[-1]["problems"][0]:
                    print(f"    in short: {simplest(fuzz, case, problems).to_json()}", flush=True)
            if number % 100 == 0:
                print(f"{number} cases, {dict(tally.problems)}, {time.monotonic() - began:.0f} s", flush=True)
        results = record(tally, options.seed, time.monotonic() - began)
    print(json.dumps({**results, "failing": len(results["failing"])}, indent=1))
    if options.output:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from bench import records

        print(f"record: {records.write('fuzz', f'command_line_{options.cases}', results, options.output)}")
    return int(bool(tally.failing))


def record(tally: Tally, start: int, seconds: float) -> dict[str, Any]:
    """What a record keeps."""
    counts = {kind: tally.problems[kind] for kind in ("traceback", "hang", "lost", "left", "message", "code")}
    return {
        "command": " ".join(["python", "tests/fuzz.py", *sys.argv[1:]]),
        "seed": start,
        "cases": sum(tally.cases.values()),
        "in_processes_of_their_own": tally.processes,
        "cases_by_command": dict(tally.cases.most_common()),
        "exit_codes": dict(tally.codes.most_common()),
        "tracebacks": counts["traceback"],
        "hangs": counts["hang"],
        "lost_files": counts["lost"],
        "files_left_by_refused_commands": counts["left"],
        "messages_of_more_than_a_line": counts["message"],
        "code_run": counts["code"],
        "slowest_seconds": round(tally.slowest, 1),
        "seconds": round(seconds),
        "failing": tally.failing,
    }


if __name__ == "__main__":
    sys.exit(main())
