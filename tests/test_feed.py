"""Data workers that die, stall or starve: who waits for them hears signals, and is told which worker and why."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from mapet.cli import main
from mapet.data import feed
from mapet.data.feed import Feed, FeedStopped, WorkerFailure, check_shared_memory
from mapet.errors import ConfigError, DataError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")


def numbers(key, beat):
    """A batch of a key."""
    return torch.full((4,), key)


def troubled(trouble, at=3):
    """As `numbers`, with trouble at one key."""

    def make(key, beat):
        if key == at:
            trouble(beat)
        return numbers(key, beat)

    return make


def kill(beat):
    os.kill(os.getpid(), signal.SIGKILL)


def stop(beat):
    os.kill(os.getpid(), signal.SIGSTOP)


def leave(beat):
    os._exit(3)


def sleep(beat):
    time.sleep(3600)


def slow(beat):
    for _ in range(12):
        time.sleep(0.1)
        beat()


def refuse(beat):
    raise DataError("this image is not one")


def break_down(beat):
    raise KeyError("a bug")


def fed(make, workers=2, **options):
    return Feed(make, range(8), workers=workers, batch_bytes=32, patience=options.pop("patience", 0.8), **options)


def read(batches):
    return [int(batch[0]) for batch in batches]


def reset():
    raise ConnectionResetError("Connection reset by peer")


class Reset:
    """Raises where it arrives, as what a dying worker has begun to hand over."""

    def __reduce__(self):
        return reset, ()


def half_handed_over(key, beat):
    if key == 3:
        threading.Timer(0.3, kill, (beat,)).start()
        return Reset()
    return numbers(key, beat)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_batches_come_in_order_and_the_end_stays_the_end(workers):
    with fed(numbers, workers) as batches:
        assert read(batches) == list(range(8)) and read(batches) == []
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        (kill, r"data worker 1 of 2 \(process \d+\) was killed by SIGKILL: so the system does where memory runs out"),
        (leave, r"data worker 1 of 2 \(process \d+\) ended with code 3"),
        (stop, r"data worker 1 of 2 \(process \d+\) has made no progress for .* it is stopped \(SIGSTOP\); look at"),
        (sleep, r"data worker 1 of 2 \(process \d+\) has made no progress for .* raise patience \(0.8 s\)"),
        (refuse, "^this image is not one$"),
    ],
)
def test_a_worker_that_fails_is_named_and_all_are_ended(trouble, text):
    got = []
    with pytest.raises(DataError, match=text), fed(troubled(trouble)) as batches:
        for batch in batches:
            got.append(int(batch[0]))
    # A batch that a worker has made, but not handed over, goes with it.
    assert got == list(range(len(got))) and len(got) <= 3
    assert not multiprocessing.active_children()


def test_too_many_open_files_is_a_failure_of_the_workers():
    def refuse_files(beat):
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(WorkerFailure, match=r"too many files .* fewer workers"), fed(troubled(refuse_files)) as batches:
        read(batches)


def test_a_worker_whose_connection_breaks_before_its_end_is_known_is_named():
    with (
        pytest.raises(WorkerFailure, match=r"data worker 1 of 2 \(process \d+\) was killed by SIGKILL"),
        fed(half_handed_over) as batches,
    ):
        read(batches)


def test_a_bug_in_a_worker_keeps_its_traceback_and_ends_the_workers():
    with pytest.raises(KeyError, match="in break_down"), fed(troubled(break_down)) as batches:
        read(batches)
    assert not multiprocessing.active_children()


def test_slow_is_not_stalled():
    with fed(troubled(slow)) as batches:
        assert read(batches) == list(range(8))


def test_reading_in_the_process_itself_stalls_too():
    with pytest.raises(WorkerFailure, match="reading data has made no progress"), fed(troubled(sleep), 0) as batches:
        read(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_who_waits_hears_that_it_shall_stop(workers):
    asked = threading.Event()
    threading.Timer(0.5, asked.set).start()
    with fed(troubled(sleep), workers, patience=60.0, stopped=asked.is_set) as batches:
        assert [int(next(batches)[0]) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(FeedStopped):
            next(batches)


def test_a_death_elsewhere_raises_nothing_in_the_middle_of_something():
    """torch's own handler of SIGCHLD raises wherever the process is, an optimizer's update included."""
    before = signal.getsignal(signal.SIGCHLD)
    with fed(troubled(kill)) as batches:
        next(batches)
        assert signal.getsignal(signal.SIGCHLD) is before
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and all(process.is_alive() for process in batches._processes):
            time.sleep(0.01)  # nothing is raised here
        assert not all(process.is_alive() for process in batches._processes)


def test_no_room_to_hand_a_batch_over(monkeypatch):
    with pytest.raises(WorkerFailure, match=r"cannot hand over its batch: /dev/shm has 0.0 MiB free"):  # noqa: SIM117
        with fed(troubled(sleep)) as batches:
            monkeypatch.setattr(feed, "free_shared_memory", lambda: 16)
            read(batches)


@pytest.mark.parametrize(
    ("free", "processes", "text"),
    [
        (64, 1, r"2 data workers have up to 6 batches of 16.0 MiB under way, 96.0 MiB in all, and /dev/shm has 64.0 MiB"
                r" free: workers 1 fits; or take smaller batches, workers 0, or .* --shm-size"),
        (64, 4, r"under way, in each of 4 processes, 384.0 MiB in all.* free: take smaller batches"),
    ],
)  # fmt: skip
def test_shared_memory_is_compared_with_the_batches_under_way(free, processes, text, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(feed, "free_shared_memory", lambda: free * 2**20)
    with pytest.raises(ConfigError, match=text):
        Feed(numbers, range(8), workers=2, batch_bytes=16 * 2**20)
    assert not multiprocessing.active_children(), "before a worker is started"
    check_shared_memory(0, 16 * 2**20)
    monkeypatch.setattr(feed, "free_shared_memory", lambda: None)
    check_shared_memory(2, 2**50)


def test_tokenize_compares_before_the_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(feed, "free_shared_memory", lambda: 2**20)
    assert main(["tokenize", "--images", "digits", "--output", str(tmp_path / "cache"), "--vocabulary", "16"]) == 2
    error = capsys.readouterr().err
    assert "--workers 0" in error and "/dev/shm has 1.0 MiB free" in error and not list(tmp_path.iterdir())


def feed_in_a_child():
    with fed(numbers) as batches:
        assert read(batches) == list(range(8))
    batches = fed(troubled(sleep))
    assert int(next(batches)[0]) == 0  # and never closed


def test_a_process_of_multiprocessing_feeds_too():
    """Its children have other names, and it ends in another way than a program."""
    child = multiprocessing.get_context("fork").Process(target=feed_in_a_child)
    child.start()
    child.join(30)
    code = child.exitcode
    child.kill()
    assert code == 0


def test_a_program_that_fails_with_workers_under_way_ends():
    script = (
        "from test_feed import *\n"
        "batches = Feed(troubled(sleep), range(8), workers=2, batch_bytes=32)\n"
        "next(batches)\n"
        "raise SystemExit('some other failure')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=os.path.dirname(__file__), capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "some other failure\n")
