"""Whole runs: resume, stop signals, sample order, failures, refusals and a soak. Assertions 1, 5, 6, 9 and 20."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tiny_run import IMAGES, latest, make_cache, make_config

from mapet.config import ModelConfig
from mapet.data.loader import step_ids
from mapet.errors import CheckpointError, ConfigError, DataError, TrainingError
from mapet.training import loop as train
from mapet.training.checkpoint import CheckpointStore
from mapet.training.learner import Learner
from mapet.training.loop import pretrain

SCRIPT = Path(__file__).parent / "tiny_run.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.fixture
def before_step(monkeypatch):
    """Register functions of (learner, step, batch) that every step begins with."""
    calls, original = [], Learner.step

    def step(self, step, batch, **options):
        for call in calls:
            call(self, step, batch)
        original(self, step, batch, **options)

    monkeypatch.setattr(Learner, "step", step)
    return calls.append


def final_state(output: Path):
    return latest(CheckpointStore(output / "checkpoints")).state


def flatten(value, name: str = "") -> dict[str, object]:
    """Leaves of nested dicts and lists by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in flatten(v, f"{name}/{k}").items()}
    return {name: value}


def differing(a, b) -> list[str]:
    """Paths at which two states differ by a single bit."""
    ours, theirs = flatten(vars(a)), flatten(vars(b))
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, value in ours.items()
        if not (torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name])
    ]


def metrics(output: Path) -> list[dict]:
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("precision", "stop"), [("fp32", 7), ("fp16", 8), ("bf16", 3)])
def test_assertion_01_resume_is_exact(precision, stop, cache, tmp_path, before_step):
    """12 steps of 5 an epoch, stopped in mid-epoch, with drop-path, EMA and jitter, and an overflow in fp16."""
    handles = []

    def disturb(learner, step, batch):
        random.random(), np.random.rand(), torch.rand(1)  # so that the global generators move, and must be restored
        while handles:
            handles.pop().remove()
        if precision == "fp16" and step == 4:
            weight = learner.task.model.norm.weight
            handles.append(weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf"))))

    before_step(disturb)
    changes = {"train.precision": precision, "train.ema_decay": 0.95, "train.micro_batch": 4, "train.save_every": 5}
    straight = pretrain(make_config(cache, tmp_path / "straight", **changes, **{"train.max_steps": 12}))
    first = pretrain(make_config(cache, tmp_path / "resumed", **changes, **{"train.max_steps": stop}))
    random.random(), np.random.rand(), torch.rand(1)
    resumed = pretrain(make_config(cache, tmp_path / "resumed", **changes, **{"train.max_steps": 12}))
    assert (straight.step, first.step, resumed.step) == (12, stop, 12)
    a, b = final_state(tmp_path / "straight"), final_state(tmp_path / "resumed")
    for state in (a, b):
        state.config["train"].pop("output")
    assert differing(a, b) == []
    assert {"optimizer", "scaler", "random"} < a.trainer.keys() and a.ema and a.trainer["optimizer"]["state"]
    if precision == "fp16":
        assert a.trainer["scaler"]["scale"] == 32768.0
    assert resumed.best_loss == straight.best_loss and resumed.best_step == straight.best_step
    learned = [[(m["step"], m["loss"], m["lr"]) for m in metrics(tmp_path / name)] for name in ("straight", "resumed")]
    assert learned[0] == learned[1] and len(learned[0]) == 12


def test_going_on_goes_on_where_it_stopped(cache, tmp_path, capsys):
    pretrain(make_config(cache, tmp_path, **{"train.max_steps": 4}))
    result = pretrain(make_config(cache, tmp_path, **{"train.max_steps": 6}))
    assert "going on from step 4" in capsys.readouterr().out
    assert result.step == 6
    again = pretrain(make_config(cache, tmp_path, **{"train.max_steps": 6}))
    assert (again.step, again.loss, again.best_loss) == (6, None, result.best_loss), "nothing was left to do"
    assert again.checkpoint == result.checkpoint and again.checkpoint.is_dir()


def test_a_run_ends_with_its_last_epoch(cache, tmp_path):
    result = pretrain(make_config(cache, tmp_path, **{"optim.cooldown_epochs": 1, "train.log_every": 7}))
    assert result.step == result.last_step == 25 and result.exit_code == 0
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [7, 14, 21, 25]
    assert lines[-1]["lr"] == pytest.approx(1e-5) and lines[-1]["epoch"] == 5.0
    assert all(line["accuracy"] is not None and 0 <= line["data_wait"] <= 1 for line in lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_assertion_05_a_signal_gives_a_checkpoint_within_the_step(number, code, cache, tmp_path, before_step):
    before_step(lambda learner, step, batch: step == 6 and os.kill(os.getpid(), number))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    result = pretrain(make_config(cache, tmp_path))
    assert (result.step, result.exit_code) == (7, code)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [7]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_a_second_interrupt_does_not_wait(cache, tmp_path, before_step):
    def interrupt_twice(learner, step, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before_step(interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        pretrain(make_config(cache, tmp_path))
    assert CheckpointStore(tmp_path / "checkpoints").steps() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_assertion_05_a_signal_to_a_process_and_its_workers(number, code, cache, tmp_path):
    """The signal goes to the whole process group, as batch schedulers and terminals send it."""
    changes = {"optim.epochs": 10_000, "data.workers": 2}
    command = [sys.executable, SCRIPT, cache, tmp_path, json.dumps(changes)]
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "metrics.jsonl").exists() and metrics(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [metrics(tmp_path)[-1]["step"]]
    assert f"stopped by {signal.Signals(number).name}" in output and errors == ""


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_assertion_06_resumed_sample_ids(workers, cache, tmp_path, before_step):
    seen = []
    before_step(lambda learner, step, batch: seen.append((step, batch["ids"].tolist())))
    pretrain(make_config(cache, tmp_path, **{"data.workers": workers, "train.max_steps": 7}))
    pretrain(make_config(cache, tmp_path, **{"data.workers": workers}))
    assert [step for step, _ in seen] == list(range(20))
    for epoch in range(4):
        ids = [i for step, batch in seen if step // 5 == epoch for i in batch]
        assert sorted(ids) == list(range(IMAGES)), "0 missing, 0 twice"
    expected = [step_ids(IMAGES, seed=0, step=step, global_batch=8).tolist() for step in range(20)]
    assert [batch for _, batch in seen] == expected


@pytest.mark.parametrize("log_every", [1, 10])
def test_assertion_09_a_failure_names_step_and_batch_and_spares_the_checkpoint(log_every, cache, tmp_path, before_step):
    learners = []

    def poison(learner, step, batch):
        learners[:] = [learner]
        if step == 6:
            handle = learner.task.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
            learners.append(handle)

    before_step(poison)
    changes = {"train.log_every": log_every, "train.save_every": 5}
    with pytest.raises(TrainingError) as caught:
        pretrain(make_config(cache, tmp_path / "broken", **changes))
    assert caught.value.exit_code == 1
    ids = step_ids(IMAGES, seed=0, step=6, global_batch=8).tolist()
    for part in ("step 6", ", ".join(map(str, ids)), "gradient norm nan", "before the weights changed"):
        assert part in str(caught.value)
    assert CheckpointStore(tmp_path / "broken/checkpoints").steps() == [5]
    weights = {name: value.clone() for name, value in learners[0].task.state_dict().items()}
    pretrain(make_config(cache, tmp_path / "whole", **{"train.max_steps": 6}))
    expected = final_state(tmp_path / "whole").task
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_assertion_09_the_ids_of_a_large_batch_go_to_a_file(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "IDS_SHOWN", 3)
    config = make_config(cache, tmp_path, **{"optim.lr": 1e3, "optim.clip": 0.0, "optim.warmup_epochs": 0})
    with pytest.raises(TrainingError, match=r"all 8 in .*failed_step_\d+.json"):
        pretrain(config)
    written = json.loads(next(tmp_path.glob("failed_step_*.json")).read_text())
    assert written["ids"] == step_ids(IMAGES, seed=0, step=written["step"], global_batch=8).tolist()


def test_assertion_09_exit_code_of_a_process(cache, tmp_path):
    changes = {"optim.lr": 1e3, "optim.clip": 0.0, "optim.warmup_epochs": 0}
    command = [sys.executable, SCRIPT, cache, tmp_path, json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "before the weights changed" in done.stderr


def test_fp16_that_overflows_for_ever_ends_with_advice(cache, tmp_path, before_step):
    def poison(learner, step, batch):
        if step == 0:
            learner.task.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))

    before_step(poison)
    config = make_config(cache, tmp_path, **{"train.precision": "fp16", "optim.epochs": 20, "train.log_every": 50})
    with pytest.raises(TrainingError, match=r"still overflow at a loss scale of .*bf16"):
        pretrain(config)


def test_assertion_03_all_checkpoints_damaged_ends_a_process_with_a_message(cache, tmp_path):
    result = pretrain(make_config(cache, tmp_path, **{"train.max_steps": 2}))
    (result.checkpoint / "trainer.pt").write_bytes(b"")
    command = [sys.executable, SCRIPT, cache, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no valid checkpoint is left" in done.stderr and "trainer.pt" in done.stderr
    assert "Traceback" not in done.stderr


def test_not_resuming_starts_afresh_and_keeps_what_was(cache, tmp_path):
    pretrain(make_config(cache, tmp_path, **{"train.max_steps": 6}))
    fresh = make_config(cache, tmp_path, **{"train.max_steps": 3, "train.seed": 9, "train.resume": False})
    assert pretrain(fresh).step == 3
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [3]
    assert CheckpointStore(tmp_path / "before_1/checkpoints").steps() == [6]


def test_a_checkpoint_of_other_options_or_data_is_refused(cache, tmp_path):
    pretrain(make_config(cache, tmp_path / "run", **{"train.max_steps": 2}))
    with pytest.raises(CheckpointError, match=r"optim.lr was 0.0015, is 0.1"):
        pretrain(make_config(cache, tmp_path / "run", **{"optim.lr": 0.1}))
    with pytest.raises(CheckpointError, match="learned from other images or tokens"):
        pretrain(make_config(make_cache(tmp_path / "other", seed=1), tmp_path / "run"))
    moved = cache.rename(cache.with_name("moved"))
    try:
        assert pretrain(make_config(moved, tmp_path / "run", **{"train.max_steps": 3})).step == 3
    finally:
        moved.rename(cache)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optim.global_batch": 41}, ConfigError, "global_batch 41 is larger than the data, 40 images"),
        ({"train.micro_batch": 3}, ConfigError, "micro_batch 3 does not divide 8"),
        ({"train.device": "tpu"}, ConfigError, "auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"train.trackers": ("wandb",)}, ConfigError, "wandb"),
        ({"data.cache": Path("nowhere")}, DataError, "nowhere"),
    ],
)
def test_refusals_write_nothing(changes, error, message, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(error, match=message):
        pretrain(make_config(cache, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [({"vocabulary": 64}, "vocabulary"), ({"image_size": 32}, "image_size"), ({"patch_size": 8}, "patch_size")],
)
def test_a_cache_for_another_model_is_refused(model, message, cache, tmp_path):
    base = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "vocabulary": 32}
    config = make_config(cache, tmp_path / "run", **{"objective.cut": 2})
    config = type(config)(ModelConfig(**{**base, **model}), config.objective, config.data, config.optim, config.train)
    with pytest.raises(DataError, match=message):
        pretrain(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_assertion_20_soak(cache, tmp_path, before_step):
    resident, process = {}, psutil.Process()
    before_step(lambda learner, step, batch: resident.update({step: process.memory_info().rss}))
    changes = {"optim.epochs": 200, "train.save_every": 250, "train.log_every": 5, "train.ema_decay": 0.99}
    result = pretrain(make_config(cache, tmp_path, **changes))
    assert result.step == 1000 and result.loss < 3.0
    growth = resident[999] / resident[100] - 1
    assert growth < 0.01, f"host memory grew by {100 * growth:.2f} % from step 100 to step 1,000"
