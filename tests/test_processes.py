"""Whole runs whose processes die, stall, or are told to stop: they end, say why, and keep what was learned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_run import make_cache

from mapet.training.checkpoint import CheckpointStore
from mapet.training.metrics import FILE_NAME

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux"),
    pytest.mark.filterwarnings("ignore:This process"),
]
HERE = Path(__file__).parent
ENDLESS = {"optim.epochs": 100_000, "data.workers": 2, "data.patience": 2.0}
HARD_LIMIT = 30.0  # seconds, assertion 22


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("processes") / "cache")


def start(cache: Path, output: Path, *, launcher=(), script="tiny_run.py", arguments=(), **changes) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, HERE / script, *arguments, cache, output, json.dumps(ENDLESS | changes)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(what, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trains(output: Path):
    """Whether the run in `output` has reported a step."""
    return lambda: (output / FILE_NAME).is_file() and (output / FILE_NAME).stat().st_size > 0


def data_workers(process: subprocess.Popen | psutil.Process) -> list[psutil.Process]:
    """Its data workers: they run the same command line, since they are forked."""
    me = psutil.Process(process.pid)
    return [child for child in me.children() if child.cmdline() == me.cmdline()]


def outcome(process: subprocess.Popen, seconds: float = HARD_LIMIT) -> tuple[int, str, str]:
    """Exit code and what was printed; nothing of it may be left."""
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        with_children = subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    assert with_children.returncode == 1, "processes were left"
    return process.returncode, output, errors


def last_step(output: Path) -> int:
    return json.loads((output / FILE_NAME).read_text().splitlines()[-1])["step"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "has made no progress for")],
)
def test_assertion_22_a_worker_dies_or_stalls(number, text, cache, tmp_path):
    process = start(cache, tmp_path)
    wait_for(trains(tmp_path))
    worker = data_workers(process)[1]
    worker.send_signal(number)
    code, _, errors = outcome(process)
    assert code == 1 and errors.count("\n") == 1 and "Traceback" not in errors
    assert f"data worker 1 of 2 (process {worker.pid}) {text}" in errors
    (saved,) = CheckpointStore(tmp_path / "checkpoints").steps()
    assert f"The checkpoint of step {saved} is kept" in errors and saved == last_step(tmp_path)
    again = start(cache, tmp_path, **{"train.max_steps": saved + 2})
    assert outcome(again, 60)[0] == 0
    assert CheckpointStore(tmp_path / "checkpoints").steps()[-1] == saved + 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_assertion_23_signals_are_heard_while_data_stalls(number, code, cache, tmp_path):
    process = start(cache, tmp_path, **{"data.patience": 600.0})
    wait_for(trains(tmp_path))
    for worker in data_workers(process):
        worker.send_signal(signal.SIGSTOP)
    steps = -1
    while steps != (steps := last_step(tmp_path)):  # batches made ahead are still learned from
        time.sleep(0.5)
    process.send_signal(number)
    status, output, errors = outcome(process, 15)
    assert (status, errors) == (code, "")
    assert f"stopped by {signal.Signals(number).name} after step {steps}" in output
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [steps]


def test_an_uncaught_exception_ends_a_run_with_workers(cache, tmp_path):
    """D2: a stray file in checkpoints/ made the second save fail, and the run hung for ever."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\nimport tiny_run\nfrom mapet.training import loop as train\n"
        "def broken(self, done):\n    raise ZeroDivisionError('a bug')\n"
        "train.Run.save = broken\nsys.exit(tiny_run.main(*sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, script, cache, tmp_path / "run", json.dumps(ENDLESS | {"train.save_every": 3})],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "ZeroDivisionError: a bug" in done.stderr


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.2")


def ranks(launcher: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(launcher.pid).children() if "tiny_run.py" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_assertion_22_under_torchrun_the_job_ends_and_restarts(number, cache, tmp_path):
    process = start(cache, tmp_path, launcher=(*TORCHRUN, "--max-restarts", "1"), **{"train.max_steps": 600})
    wait_for(trains(tmp_path))
    first = ranks(process)
    data_workers(first[1])[0].send_signal(number)
    wait_for(lambda: not any(rank.is_running() for rank in first), HARD_LIMIT)
    code, output, errors = outcome(process, 120)
    assert code == 0, errors
    assert "data worker 0 of 2" in errors and "another process of this run has no data to go on with" in errors
    assert "going on from step" in output
    assert CheckpointStore(tmp_path / "checkpoints").steps()[-1] == 600


@pytest.mark.slow
def test_assertion_27_ranks_of_a_killed_torchrun_stop_by_themselves(cache, tmp_path):
    process = start(cache, tmp_path, launcher=TORCHRUN)
    wait_for(trains(tmp_path))
    orphans = ranks(process)
    assert len(orphans) == 2
    process.kill()
    _, alive = psutil.wait_procs(orphans, timeout=HARD_LIMIT)
    assert not alive
    _, output, _ = outcome(process)
    assert "stopped by the end of its torchrun after step" in output
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [last_step(tmp_path)]


@pytest.mark.slow
def test_assertion_23_torchrun_passes_sigterm_on_while_data_stalls(cache, tmp_path):
    process = start(cache, tmp_path, launcher=TORCHRUN, **{"data.patience": 600.0})
    wait_for(trains(tmp_path))
    for worker in data_workers(ranks(process)[0]):
        worker.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.terminate()
    code, output, _ = outcome(process)
    assert code != 0 and "stopped by SIGTERM after step" in output
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [last_step(tmp_path)]
