"""A run that ends in time: measured, decided once, kept on resume. Time is a number that the test moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import latest, make_cache, make_config

from mapet.errors import CheckpointError, ConfigError
from mapet.training.budget import MARGIN, Clocks, decide
from mapet.training.checkpoint import CheckpointStore
from mapet.training.learner import Learner
from mapet.training.loop import pretrain
from mapet.training.schedule import StepPlan

BUDGET = {"train.budget": "3min", "train.max_steps": 6, "train.save_every": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.fixture
def clocks(monkeypatch) -> Clocks:
    """Both clocks stand still but for 2 seconds of every optimizer step."""
    now, step = [1000.0], Learner.step

    def slow_step(self, *arguments, **options):
        now[0] += 2.0
        step(self, *arguments, **options)

    monkeypatch.setattr(Learner, "step", slow_step)
    return Clocks(wall=lambda: now[0], steady=lambda: now[0])


def weights(output: Path) -> dict[str, torch.Tensor]:
    return latest(CheckpointStore(output / "checkpoints")).state.task


def test_epochs_are_what_fits_and_the_measurement_leaves_no_trace(cache, tmp_path, clocks, capsys):
    """5 steps warm up and 30 are measured, 70 s; of 180 s 5 % are spare; so 101 s are left, for epochs of 10 s."""
    assert MARGIN == 0.05
    result = pretrain(make_config(cache, tmp_path / "budget", **BUDGET), clocks=clocks)
    said = capsys.readouterr().out
    assert "budget 3min: 10 epochs, 1 of them warm-up, 5 steps of 2 s each, 5 % to spare" in said
    assert said.index("budget 3min") < said.index("step 1/6"), "before it starts"
    assert result.last_step == 6
    pretrain(make_config(cache, tmp_path / "plain", **{"optim.epochs": 10, "train.max_steps": 6}))
    ours, theirs = weights(tmp_path / "budget"), weights(tmp_path / "plain")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_resumed_run_keeps_the_decision(cache, tmp_path, clocks, capsys):
    pretrain(make_config(cache, tmp_path, **BUDGET), clocks=clocks)
    stored = json.loads((tmp_path / "budget.json").read_text())
    assert (stored["started"], stored["epochs"], stored["seconds_per_step"]) == (1000.0, 10, 2.0)
    later = Clocks(wall=lambda: 5000.0, steady=clocks.steady)
    capsys.readouterr()
    result = pretrain(make_config(cache, tmp_path, **{**BUDGET, "train.max_steps": 0}), clocks=later)
    assert result.step == result.last_step == 50
    assert "10 epochs" in capsys.readouterr().out
    assert json.loads((tmp_path / "budget.json").read_text()) == stored


def test_a_fresh_run_decides_anew(cache, tmp_path, clocks):
    pretrain(make_config(cache, tmp_path, **BUDGET), clocks=clocks)
    again = {**BUDGET, "train.resume": False, "train.budget": "4min"}
    pretrain(make_config(cache, tmp_path, **again), clocks=clocks)
    assert json.loads((tmp_path / "budget.json").read_text())["epochs"] == 15


def test_a_budget_without_room_for_one_epoch_is_refused(cache, tmp_path, clocks):
    with pytest.raises(ConfigError, match=r"budget 78s is too short: an epoch takes 10 s .*give at least 1.4 min"):
        pretrain(make_config(cache, tmp_path, **{**BUDGET, "train.budget": "78s"}), clocks=clocks)
    assert not (tmp_path / "budget.json").exists()


def test_a_damaged_decision_is_refused(cache, tmp_path):
    (tmp_path / "budget.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"budget.json cannot be read"):
        pretrain(make_config(cache, tmp_path, **BUDGET))


def test_warm_up_and_cooldown_are_part_of_the_budget(cache, tmp_path):
    steps = StepPlan(per_epoch=100, last=0, share=8, micro=8)
    config = make_config(cache, tmp_path, **{"train.budget": "10h", "optim.epochs": 300, "optim.warmup_epochs": 10})
    decision = decide(config, steps, seconds=1.0, started=0.0, now=3600.0)
    assert (decision.epochs, decision.warmup_epochs) == (306, 10), "(0.95 * 36000 - 3600) / 100"
    config = make_config(cache, tmp_path, **{"train.budget": "1h", "optim.cooldown_epochs": 4})
    decision = decide(config, steps, seconds=1.0, started=0.0, now=0.0)
    assert (decision.epochs, decision.warmup_epochs) == (30, 1)
    decision = decide(make_config(cache, tmp_path, **{"train.budget": "6min"}), steps, 1.0, 0.0, 0.0)
    assert (decision.epochs, decision.warmup_epochs) == (3, 0)
