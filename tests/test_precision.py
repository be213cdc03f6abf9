"""train.precision auto: what it stands for, and that a run settles it once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import latest, make_cache, make_config

from mapet.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from mapet.distributed import World
from mapet.errors import CheckpointError, ConfigError
from mapet.objectives import options
from mapet.planning.memory import predict_memory, step_size
from mapet.training import precision as precision_module
from mapet.training.checkpoint import CheckpointStore
from mapet.training.learner import Learner
from mapet.training.loop import pretrain
from mapet.training.precision import automatic, settled
from mapet.training.schedule import plan_steps

CPU = World(torch.device("cpu"))
CUDA = World(torch.device("cuda", 0))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "fp32"), ((6, 1), "fp16"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((10, 3), "bf16")],
)
def test_auto_is_bf16_where_a_gpu_has_it_and_fp16_before(capability, expected, monkeypatch):
    assert automatic(capability) == expected
    if capability:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config, why = settled(RunConfig(train=TrainConfig(precision="auto")), CUDA if capability else CPU)
    assert config.train.precision == expected
    assert why == ("what auto takes on cuda:0" if capability else "what auto takes on cpu")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_precision_by_name_stays(name):
    config = RunConfig(train=TrainConfig(precision=name))
    assert settled(config, CPU) == (config, "")


def test_processes_with_different_gpus_need_a_name(monkeypatch):
    monkeypatch.setattr(World, "gather", lambda self, value: [value, "fp16"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=r"auto would be bf16 and fp16 in different processes.*name one"):
        settled(RunConfig(train=TrainConfig(precision="auto")), CUDA)


def test_a_checkpoint_holds_what_auto_took_and_a_run_elsewhere_is_told(cache, tmp_path, monkeypatch):
    changes = {"train.precision": "auto", "train.max_steps": 2}
    pretrain(make_config(cache, tmp_path, **changes))
    assert latest(CheckpointStore(tmp_path / "checkpoints")).state.config["train"]["precision"] == "fp32"
    assert pretrain(make_config(cache, tmp_path, **{**changes, "train.max_steps": 3})).step == 3
    monkeypatch.setattr(precision_module, "automatic", lambda capability: "bf16")
    message = r"train.precision was fp32, is bf16 \(what auto takes on cpu; to go on here, name the earlier one\)"
    with pytest.raises(CheckpointError, match=message):
        pretrain(make_config(cache, tmp_path, **changes))
    by_name = make_config(cache, tmp_path, **{"train.precision": "fp32", "train.max_steps": 4})
    assert pretrain(by_name).step == 4


def test_a_run_says_what_auto_took(cache, tmp_path, capsys):
    pretrain(make_config(cache, tmp_path, **{"train.precision": "auto", "train.max_steps": 1}))
    assert "precision fp32, what auto takes on cpu" in capsys.readouterr().out


def test_a_learner_wants_it_settled(cache):
    config = make_config(cache, Path("unused"), **{"train.precision": "auto"})
    with pytest.raises(ValueError, match="settled before a learner is made"):
        Learner(config, CPU, plan_steps(config, 40, 1))


def test_the_plan_of_auto_is_that_of_two_bytes():
    config = RunConfig(ModelConfig(), options("mapet"), optim=OptimConfig(global_batch=64))
    auto, bf16, fp16 = (
        predict_memory(step_size(replace(config, train=TrainConfig(precision=name)), 1))
        for name in ("auto", "bf16", "fp16")
    )
    assert auto == bf16 == fp16


def test_an_unknown_precision_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="must be one of fp32, bf16, fp16, auto, got 'fp8'"):
        TrainConfig(precision="fp8")
