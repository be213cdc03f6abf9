"""metrics.jsonl, TensorBoard, trackers, and what counts as best."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mapet.errors import ConfigError, MapetError
from mapet.training.metrics import Best, MetricsLog, StepMetrics, keep_until

NAN = float("nan")


def line(step: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(step, step / 5, loss, {"accuracy": 0.5}, 1e-3, 2.0, 100.0, 0.1, 60.0)


def test_lines_are_json_objects_and_a_nan_becomes_null(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(line(1, 3.0))
        log.write(line(2, NAN))
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in lines] == [(1, 3.0), (2, None)]
    assert lines[0]["images_per_second"] == 100.0


def test_a_resumed_log_drops_later_and_torn_lines_and_goes_on(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in range(1, 6):
            log.write(line(step, 6.0 - step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with MetricsLog(tmp_path, 3) as log:
        assert (log.best_loss.step, log.best_loss.value) == (3, 3.0)
        log.write(line(4, 9.0))
    assert [entry["step"] for entry in keep_until(tmp_path / "metrics.jsonl", 100)] == [1, 2, 3, 4]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 9.0)]


@pytest.mark.parametrize("values", [[NAN, 2.0, 3.0], [2.0, NAN, 3.0], [3.0, 2.0, NAN], [math.inf, 2.0, -math.inf]])
def test_assertion_07_a_nan_metric_is_never_best(values):
    best = Best()
    for step, value in enumerate(values):
        best.consider(step, value)
    assert best.value == 2.0
    assert best.step == values.index(2.0)


def test_assertion_07_nothing_but_nan_has_no_best():
    best = Best()
    assert not best.consider(1, NAN) and not best.consider(2, None)
    assert best.value is None


def test_a_missing_tracker_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb.*pip install wandb"):
        MetricsLog(tmp_path / "run", 0, ("wandb",))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_configuration_curves_and_an_end(name, tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    started = []
    module = SimpleNamespace(__name__=name, init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, name, module)
    for _ in range(2):
        with MetricsLog(tmp_path, 0, (name,), {"optim": {"lr": 1}}) as log:
            log.write(line(10, 1.5))
    assert calls[0][0] == 10 and calls[0][1]["loss"] == 1.5 and calls[1] == "end"
    assert started[0]["config"] == {"optim": {"lr": 1}} and started[0]["resume"] == "allow"
    assert started[0]["name"] == started[1]["name"], "a resumed run must be the same run in the tracker"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(MapetError, match=r"cannot write the metrics of the run in .*run: File exists"):
        MetricsLog(tmp_path / "run", 0)


def test_what_cannot_be_written_later_is_a_warning_and_the_run_goes_on(tmp_path):
    with MetricsLog(tmp_path / "run", 0) as log:
        log.write(line(1, 2.0))
        log._file.close()
        log._file = open("/dev/full", "a")  # noqa: SIM115, the log closes it
        with pytest.warns(UserWarning, match=r"cannot write .*metrics.jsonl: No space left on device; the run goes on"):
            log.write(line(2, 1.5))
        log.write(line(3, 1.0))
    assert (log.best_loss.step, log.best_loss.value) == (3, 1.0)
