"""A method that nothing else knows of: Toy, with its own batch, draws, head, teacher and metric, on timm's own ViT.

It is pre-trained, killed, resumed, averaged, shared out over processes, planned and exported without a line elsewhere.
As a script this file is one process of such a run: test_toy_method.py CACHE OUTPUT CHANGES [STEP that kills it].
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_run import latest, make_cache, make_config
from torch import Tensor, nn

from mapet import objectives
from mapet.checked import fraction
from mapet.cli import main as mapet
from mapet.config import ModelConfig, ObjectiveConfig, RunConfig
from mapet.data.cache import TokenCache
from mapet.data.loader import Share
from mapet.model.export import from_timm
from mapet.planning.memory import predict_memory, step_size
from mapet.rng import StepRng
from mapet.task import Batch, Draws, Task
from mapet.training import limits
from mapet.training.checkpoint import CheckpointState, CheckpointStore
from mapet.training.learner import Learner
from mapet.training.loop import TrainResult, pretrain

PACKAGE = Path(objectives.__file__).parents[1]
CHANGES = {
    "objective.name": "toy",
    "data.held_out": 0.2,
    "train.ema_decay": 0.9,
    "train.max_steps": 6,
    "optim.eps": 1e-3,
}
SIZES = "--model.image-size 16 --model.patch-size 4 --model.width 32 --model.depth 2 --model.heads 2 --device cpu"


@dataclass(frozen=True)
class ToyConfig(ObjectiveConfig):
    """Toy predicts the mean colour of a picture, and what a slowly moving copy of its head says."""

    name: Literal["toy"] = "toy"
    momentum: Annotated[float, fraction()] = 0.75
    """Of the teacher."""


class Colours(TokenCache):
    """Pictures with their mean colour, in place of tokens."""

    def batch(self, ids: Tensor, share: Share, beat: Callable[[], None]) -> Batch:
        pictures = self.images(ids, beat)
        return {"pictures": pictures, "colour": pictures.float().mean(dim=(2, 3)) / 255}


class Toy(Task):
    """The student is timm's ViT and a linear head; the teacher, another head, follows after every update."""

    Options = ToyConfig

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        model = config.model
        self.vit = VisionTransformer(
            img_size=model.image_size,
            patch_size=model.patch_size,
            embed_dim=model.width,
            depth=model.depth,
            num_heads=model.heads,
            init_values=model.layer_scale,
            num_classes=0,
            global_pool="avg",
            fc_norm=False,
        )
        self.head = nn.Linear(model.width, 3)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)

    @classmethod
    def open(cls, config: RunConfig) -> Colours:
        return Colours.open(config.data.cache)

    def draw(self, images: int, rng: StepRng) -> Draws:
        return {"noise": torch.randn(images, 3, 1, 1, generator=rng.generator("noise"), device=rng.device)}

    def forward(self, batch: Batch, draws: dict[str, Any], *, metrics: bool = True) -> dict[str, Tensor]:
        features = self.vit(batch["pictures"] / 255 + 0.1 * draws["noise"])
        said, taught = self.head(features), self.teacher(features).detach()
        error = (said - batch["colour"]).abs().mean()
        values = {"loss": error + 0.1 * (said - taught).square().mean()}
        return values | ({"error": error.detach()} if metrics else {})

    def example(self, images: int) -> Batch:
        pictures = torch.empty(images, 3, self.config.image_size, self.config.image_size, dtype=torch.uint8)
        return {"pictures": pictures, "colour": torch.empty(images, 3)}

    def units(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    def backbone(self) -> tuple[ModelConfig, dict[str, Tensor]]:
        return from_timm(self.vit)

    @torch.no_grad()
    def after_update(self, step: int, skip: Tensor) -> None:
        for mine, student in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            mine += (student - mine) * ((1 - self.options.momentum) * (1 - skip))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a method needs."""
    monkeypatch.setitem(objectives.OBJECTIVES, "toy", f"{__name__}:Toy")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def run(cache: Path, output: Path, **changes: Any) -> TrainResult:
    return pretrain(make_config(cache, output, **{**CHANGES, **changes}))


def saved(output: Path) -> CheckpointState:
    return latest(CheckpointStore(output / "checkpoints")).state


def processes(count: int, *arguments: object) -> list[int]:
    """This file as so many processes of one run; their exit codes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launch, __file__, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240, check=False)
    return done.returncode


def assert_same(ours: CheckpointState, theirs: CheckpointState, **tolerance: float) -> None:
    for a, b in ((ours.task, theirs.task), (ours.ema, theirs.ema)):
        torch.testing.assert_close(a, b, **tolerance)


def test_it_learns_and_its_teacher_follows(cache, tmp_path, capsys):
    result = run(cache, tmp_path, **{"train.max_steps": 20, "optim.lr": 1e-2})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics == {name: lines[-1][name] for name in ("error", "val_loss", "val_error")}
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and "accuracy" not in lines[0]
    assert "· error 0." in capsys.readouterr().out
    state = saved(tmp_path)
    student, teacher = state.task["head.weight"], state.task["teacher.weight"]
    assert 0 < (student - teacher).abs().max() < 0.1
    assert state.ema.keys() == {name for name in state.task if not name.startswith("teacher.")}


def test_a_teacher_stands_still_when_an_update_is_called_off(cache):
    config = make_config(cache, Path("unused"), **CHANGES)
    task = Toy(config)
    before = task.teacher.weight.clone()
    nn.init.ones_(task.head.weight)
    task.after_update(0, torch.tensor(1.0))
    assert torch.equal(task.teacher.weight, before)
    task.after_update(0, torch.tensor(0.0))
    torch.testing.assert_close(task.teacher.weight, before + 0.25 * (1 - before))


def test_killed_and_resumed_it_is_the_same_to_the_bit(cache, tmp_path):
    changes = json.dumps({"train.save_every": 2})
    assert processes(1, cache, tmp_path / "killed", changes, 5) == -signal.SIGKILL
    assert CheckpointStore(tmp_path / "killed/checkpoints").steps() == [2, 4]
    run(cache, tmp_path / "killed")
    run(cache, tmp_path / "whole")
    assert_same(saved(tmp_path / "killed"), saved(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(parallel, cache, tmp_path):
    changes = json.dumps({"train.parallel": parallel, "train.micro_batch": 2})
    assert processes(2, cache, tmp_path / "two", changes) == 0
    run(cache, tmp_path / "one")
    assert_same(saved(tmp_path / "two"), saved(tmp_path / "one"), rtol=1e-4, atol=1e-6)


def test_it_is_planned(cache, capsys):
    """Weights, head and teacher; gradients of what learns; both moments of AdamW. All of it 4 bytes a number."""
    sizes = ["--objective", "toy", *SIZES.split()[:-2], "--batch", "8"]
    assert mapet(["plan", *sizes, "--micro-batch", "4"]) == 0
    assert "micro-batch 4, accumulation 2, recompute none" in capsys.readouterr().out
    config = make_config(cache, Path("unused"), **CHANGES)
    planned, task = predict_memory(step_size(config, 1)), Toy(config)
    numbers, learned = (sum(p.numel() for p in task.parameters() if p.requires_grad or not only) for only in (0, 1))
    assert numbers - learned == task.teacher.weight.numel() + task.teacher.bias.numel()
    assert planned.weights == 4 * numbers and planned.average == 4 * learned
    assert planned.optimizer == pytest.approx(8 * learned, rel=0.01) and planned.activations > planned.images > 0
    advice = limits.advice(config, torch.device("cpu"), 1, 8)
    assert "out of memory with micro-batch 8" in advice and "train.micro_batch=4" in advice


def test_its_backbone_is_exported_to_timm(cache, tmp_path):
    run(cache, tmp_path / "run")
    assert mapet(["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "timm"), "--ema"]) == 0
    exported = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    task = Toy(make_config(cache, Path("unused"), **CHANGES))
    task.load_state_dict(saved(tmp_path / "run").task | saved(tmp_path / "run").ema)
    pictures = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(exported(pictures), task.vit.eval()(pictures), rtol=1e-4, atol=1e-5)


def test_its_options_are_those_of_the_command(cache, tmp_path, capsys):
    common = ["--objective", "toy", *SIZES.split(), "--cache", str(cache), "--batch", "8"]
    train = ["--objective.momentum", "0.5", "--workers", "0", "--epochs", "1", "--warmup-epochs", "0"]
    assert mapet(["pretrain", *common, *train, "--output", str(tmp_path)]) == 0
    assert saved(tmp_path).config["objective"] == {"name": "toy", "momentum": 0.5}
    assert mapet(["pretrain", *common, "--objective.momentum", "2", "--output", str(tmp_path)]) == 2
    assert "--objective.momentum must be in [0, 1], got 2.0" in capsys.readouterr().err
    assert mapet(["pretrain", *common, "--cut", "5", "--output", str(tmp_path)]) == 2
    assert "the objective toy has no such option; it has --objective.momentum" in capsys.readouterr().err


def test_nothing_else_knows_its_name():
    assert [path for path in PACKAGE.rglob("*.py") if "toy" in path.read_text().lower()] == []


def main(cache: str, output: str, changes: str, kill: str = "") -> int:
    """One process of a run of Toy."""
    objectives.OBJECTIVES["toy"] = f"{Path(__file__).stem}:Toy"
    step = Learner.step

    def step_or_die(learner: Learner, number: int, *arguments: Any, **options: Any) -> None:
        if str(number) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        step(learner, number, *arguments, **options)

    Learner.step = step_or_die
    return run(Path(cache), Path(output), **json.loads(changes)).exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
