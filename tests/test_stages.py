"""Seconds by stage: the host's by its clock, a GPU's by events that are never waited for on the way."""

import time

import pytest
import torch

from mapet.data.stages import StageClock, stage


class Stream:
    """A GPU that works off its queue only when told to; every event passes at the time it was given."""

    def __init__(self):
        self.recorded, self.passed, self.waits = 0, 0, 0

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream, self.place = stream, None

    def record(self):
        self.stream.recorded += 1
        self.place = self.stream.recorded

    def query(self):
        return self.place <= self.stream.passed

    def synchronize(self):
        self.stream.waits += 1
        self.stream.passed = max(self.stream.passed, self.place)

    def elapsed_time(self, end):
        assert end.query(), "an event was read before it had passed"
        return 1000.0 * (end.place - self.place)


def test_host_stages_add_up():
    clock = StageClock()
    with clock.running():
        for _ in range(2):
            with stage("decode"):
                time.sleep(0.01)
        with stage("write", torch.device("cpu")):
            pass
    seconds = clock.seconds()
    assert list(seconds) == ["decode", "write"]
    assert seconds["decode"] >= 0.02 > seconds["write"] >= 0


def test_device_stages_are_read_late_and_without_waiting():
    stream = Stream()
    clock = StageClock(stream.event)
    with clock.running():
        for _ in range(3):
            with stage("network", torch.device("cuda")):
                pass
            with stage("assign", torch.device("cuda")):
                stream.recorded += 4  # other work in the stream: this stage takes 5
        assert stream.waits == 0 and len(clock._pending) == 6
        stream.passed = 8
        with stage("network", torch.device("cuda")):
            pass
        assert len(clock._pending) == 5, "what has passed is read on the way"
    assert clock.seconds() == {"network": 4.0, "assign": 15.0}
    assert stream.waits == 1


def test_without_a_clock_nothing_is_measured():
    with stage("network", torch.device("cuda")):
        pass


def test_a_clock_stops_with_its_block():
    clock = StageClock()
    with pytest.raises(KeyError), clock.running():
        raise KeyError
    with stage("decode"):
        pass
    assert clock.seconds() == {}
