"""Runs that go on: after an error of the device, at a deadline, without git."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import harvest, records, timing
from bench.guard import guarded

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def broken(*_: object) -> None:
    raise RuntimeError(ILLEGAL)


def test_a_device_that_is_lost_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call into CUDA raises, the one that gives memory back included."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    result, failure = guarded(broken)
    assert result is None and failure.status == "failed"
    assert failure.reason.startswith(f"RuntimeError: {ILLEGAL}") and "lost to this process" in failure.reason
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert "lost" not in guarded(broken)[1].reason


class Clock:
    """Calls take what they return, and only they take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self, call):
        self.now += call()
        return None, call()


def test_a_deadline_keeps_what_was_timed() -> None:
    """It passes while the second of three ways is warmed up, and in the midst of the repeats."""
    ways = {name: (lambda seconds=seconds: seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}

    def measured(limit: float) -> dict[str, list[float]]:
        clock = Clock()
        found, reasons = timing.interleaved(
            ways, clock, repeats=5, budget=1e9, deadline=timing.Deadline(limit, lambda: clock.now),
            guard=lambda call: (call(), None), sample=lambda way, clock: {"call": clock.time(way)[1]},
        )  # fmt: skip
        assert not reasons
        return {name: by_phase["call"] for name, by_phase in found.items()}

    assert measured(5.0) == {"a": [1.0], "b": [2.0]}
    assert measured(6.0) == {"a": [1.0], "b": [2.0]}
    assert measured(20.0) == {"a": [1.0] * 1, "b": [2.0] * 1, "c": [4.0] * 1}
    assert measured(22.0) == {"a": [1.0] * 2, "b": [2.0] * 2, "c": [4.0] * 2}


def test_the_commit_is_known_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(records, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(harvest, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    assert records.commit() == harvest.commit() == records.environment()["commit"] == ""
    (tmp_path / "COMMIT").write_text("dc57456\n")
    assert records.commit() == harvest.commit() == "dc57456"
