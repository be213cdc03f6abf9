"""Held-out images: what a run is judged on, whatever the processes, stops and resumes, and never learns from."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_distributed import start_ranks
from tiny_run import IMAGES, make_cache, make_config

from mapet.data.cache import TokenCache
from mapet.data.loader import split_images
from mapet.distributed import World
from mapet.errors import CheckpointError, ConfigError, DataError
from mapet.objectives import build_task
from mapet.progress import LiveProgress, describe
from mapet.rng import StepRng
from mapet.training.budget import decide
from mapet.training.checkpoint import CheckpointStore, load_task
from mapet.training.learner import Learner
from mapet.training.loop import pretrain
from mapet.training.metrics import StepMetrics
from mapet.training.schedule import StepPlan, plan_steps
from mapet.training.validation import Validation

SCRIPT = Path(__file__).parent / "tiny_run.py"
HELD = {"data.held_out": 0.25}
"""10 of 40 images: a batch of 8 and one of 2. The others make 3 steps an epoch."""
VALUES = ("val_loss", "val_accuracy")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory) -> Path:
    """A run of 12 steps that nothing disturbs."""
    output = tmp_path_factory.mktemp("straight")
    pretrain(make_config(cache, output, **HELD))
    return output


def lines(output: Path) -> list[dict]:
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]


def judged(output: Path) -> dict[int, tuple[float, float]]:
    """What is written of validations, by step."""
    return {line["step"]: tuple(line[name] for name in VALUES) for line in lines(output) if "val_loss" in line}


def state_of(output: Path) -> dict[str, object]:
    """Leaves of the newest checkpoint but for its configuration."""
    store = CheckpointStore(output / "checkpoints")
    state = store.load(store.newest_valid()).state
    return {name: value for name, value in flat(vars(state)).items() if not name.startswith("/config")}


def flat(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name: value}


def same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_same_state(ours: Path, theirs: Path) -> None:
    a, b = state_of(ours), state_of(theirs)
    assert a.keys() == b.keys() and [name for name in a if not same(a[name], b[name])] == []


@pytest.mark.parametrize(
    ("share", "images", "held"), [(0.0, 40, 0), (0.25, 40, 10), (1e-6, 40, 1), (0.5, 3, 2), (0.01, 10_000, 100)]
)
def test_which_images_are_held_out_is_drawn_from_the_seed(share, images, held):
    config = make_config(Path("c"), Path("o"), **{"data.held_out": share})
    split = split_images(images, config)
    assert split.trained == images - held
    if not held:
        assert split.ids is None and split.held_out is None
        return
    for ids in (split.ids, split.held_out):
        assert ids.dtype == torch.int64 and torch.equal(ids, ids.sort().values)
    assert sorted([*split.ids.tolist(), *split.held_out.tolist()]) == list(range(images))
    if images > 1000:
        other = split_images(images, replace(config, train=replace(config.train, seed=1)))
        assert len(set(other.held_out.tolist()) & set(split.held_out.tolist())) < 20
        assert torch.bincount(split.held_out * 4 // images, minlength=4).min() > 10, "from everywhere"


def test_the_same_images_are_held_out_for_good():
    # Recorded once: a run resumed with newer libraries must not learn from what it was judged on.
    held = split_images(IMAGES, make_config(Path("c"), Path("o"), **HELD)).held_out
    assert held.tolist() == [9, 12, 13, 16, 19, 25, 27, 30, 31, 37]


@pytest.mark.parametrize("method", ["mapet", "pim", "mim"])
def test_what_is_written_is_the_mean_over_the_held_out_images(method, cache, tmp_path):
    """Against one pass over all of them with the weights of the checkpoint; at the end of an epoch and of the run."""
    changes = {"objective.name": method, "train.max_steps": 4, "train.save_every": 1, "train.keep": 4}
    changes |= {"objective.masked": 6} if method == "mim" else {}
    config = make_config(cache, tmp_path, **HELD, **changes)
    result = pretrain(config)
    written = judged(tmp_path)
    assert list(written) == [3, 4] and tuple(result.metrics[name] for name in VALUES) == written[4]
    assert "accuracy" in result.metrics
    opened, ids = TokenCache.open(cache), split_images(IMAGES, config).held_out
    for step, found in written.items():
        task = build_task(config).eval()
        task.load_state_dict(load_task(tmp_path / f"checkpoints/step_{step:09d}").state_dict())
        draws = [task.draw(8, StepRng(0, number)) for number in (-1, -2)]
        assert set(draws[0]) == {"permutation"}, "no drop-path, no jitter"
        draws = {name: torch.cat([draws[0][name], draws[1][name][:2]]) for name in draws[0]}
        with torch.no_grad():
            expected = task({"images": opened.images(ids), "tokens": opened.tokens(ids)}, draws)
        assert found == pytest.approx([float(expected["loss"]), float(expected["accuracy"])], rel=1e-5)


def test_held_out_images_are_never_learned_from_and_all_others_are(cache, tmp_path, monkeypatch):
    seen, step = [], Learner.step
    monkeypatch.setattr(Learner, "step", lambda s, n, batch, **kw: (seen.append(batch["ids"]), step(s, n, batch, **kw)))
    config = make_config(cache, tmp_path, **HELD, **{"train.max_steps": 9})
    pretrain(config)
    seen, held = torch.stack(seen).flatten(1).tolist(), split_images(IMAGES, config).held_out.tolist()
    assert len(seen) == 9 and all(len(set(ids)) == 8 and not set(ids) & set(held) for ids in seen)
    assert len({image for ids in seen for image in ids}) == 30


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_that_is_learned_depends_on_validation(precision, cache, tmp_path, monkeypatch):
    """Bit for bit that of a run that is never judged, though a task moves the global random states when it is."""
    changes = {**HELD, "train.precision": precision, "train.max_steps": 7, "train.micro_batch": 4}
    pretrain(make_config(cache, tmp_path / "judged", **changes))
    values = Validation._values
    with monkeypatch.context() as patch:

        def disturbing(self, *given):
            assert not any(module.training for module in self.learner.task.modules()) and not torch.is_grad_enabled()
            random.random(), np.random.rand(), torch.rand(1)
            return values(self, *given)

        patch.setattr(Validation, "_values", disturbing)
        pretrain(make_config(cache, tmp_path / "disturbed", **changes))
    monkeypatch.setattr(Validation, "due", lambda self, done: False)
    pretrain(make_config(cache, tmp_path / "never", **changes))
    assert list(judged(tmp_path / "judged")) == [3, 6, 7] and judged(tmp_path / "never") == {}
    assert judged(tmp_path / "disturbed") == judged(tmp_path / "judged")
    for name in ("judged", "disturbed"):
        check_same_state(tmp_path / name, tmp_path / "never")


def test_a_module_that_is_never_in_training_mode_stays_so(cache, tmp_path, monkeypatch):
    modes, values = [], Validation._values

    def looking(self, *given):
        modes.append(self.learner.task.model.norm.training)
        return values(self, *given)

    def step(self, number, batch, **options):
        if not number:
            self.task.model.norm.eval()  # as a teacher is
        modes.append((self.task.training, self.task.model.norm.training))
        original(self, number, batch, **options)

    original = Learner.step
    monkeypatch.setattr(Validation, "_values", looking)
    monkeypatch.setattr(Learner, "step", step)
    pretrain(make_config(cache, tmp_path, **HELD, **{"train.max_steps": 4}))
    assert modes == [(True, False)] * 3 + [False] * 2 + [(True, False)] + [False] * 2


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"train.micro_batch": 4}, 1e-6),
        ({"train.micro_batch": 1}, 1e-6),
        ({"data.workers": 2}, 0),
        ({"train.precision": "bf16"}, 2e-2),
    ],
)
def test_the_same_numbers_whatever_the_micro_batches_and_workers(changes, tolerance, cache, straight, tmp_path):
    pretrain(make_config(cache, tmp_path, **HELD, **changes))
    ours, theirs = judged(tmp_path), judged(straight)
    assert ours.keys() == theirs.keys() == {3, 6, 9, 12}
    assert [v[0] for v in ours.values()] == pytest.approx([v[0] for v in theirs.values()], rel=max(tolerance, 1e-4))
    if not tolerance:
        assert ours == theirs
    if "train.precision" in changes:
        assert ours != theirs, "judged in the run's precision"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(parallel, cache, tmp_path):
    """The second process has no image of the last batch. Weights agree too: what it gathered it gave back."""
    changes = {**HELD, "optim.eps": 1e-3, "train.max_steps": 7, "train.micro_batch": 2}
    arguments = (cache, tmp_path / "two", json.dumps({**changes, "train.parallel": parallel, "train.save_every": 3}))
    ranks = start_ranks(*arguments, script=SCRIPT)
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    pretrain(make_config(cache, tmp_path / "one", **changes))
    two, one = judged(tmp_path / "two"), judged(tmp_path / "one")
    assert list(two) == list(one) == [3, 6, 7]
    for step, values in one.items():
        assert two[step] == pytest.approx(values, rel=1e-5)
    ours, theirs = state_of(tmp_path / "two"), state_of(tmp_path / "one")
    weights = [name for name in theirs if name.startswith("/task")]
    torch.testing.assert_close([ours[n] for n in weights], [theirs[n] for n in weights], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [3, 7])
def test_resume_is_exact(stop, cache, straight, tmp_path):
    """Stopped at an epoch's end, and in mid-epoch, where the end of that part of the run is judged too."""
    pretrain(make_config(cache, tmp_path, **HELD, **{"train.max_steps": stop}))
    pretrain(make_config(cache, tmp_path, **HELD))
    check_same_state(tmp_path, straight)
    assert {step: values for step, values in judged(tmp_path).items() if step != 7} == judged(straight)
    assert (7 in judged(tmp_path)) == (stop == 7)


def test_a_signal_ends_a_validation_which_the_run_then_makes_up_for(cache, straight, tmp_path, monkeypatch, capsys):
    adds = []

    def add(self, sums, number, batch):
        adds.append(number)
        if len(adds) == 3:  # the first batch of the second epoch's
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, sums, number, batch)

    original = Validation._add
    monkeypatch.setattr(Validation, "_add", add)
    stopped = pretrain(make_config(cache, tmp_path, **HELD))
    assert (stopped.step, stopped.exit_code) == (6, 143) and adds == [-1, -2, -1] and "val_loss" not in stopped.metrics
    assert CheckpointStore(tmp_path / "checkpoints").newest_valid() == 6 and list(judged(tmp_path)) == [3]
    capsys.readouterr()
    only = pretrain(make_config(cache, tmp_path, **HELD, **{"train.max_steps": 6}))
    assert only.loss is None and only.metrics.keys() == set(VALUES) and adds[3:] == [-1, -2]
    assert "step 6/6 · epoch 2.00 · val_loss" in capsys.readouterr().out
    resumed = pretrain(make_config(cache, tmp_path, **HELD))
    assert resumed.step == 12 and adds[5:] == [-1, -2] * 2, "not once more what has been made up for"
    assert judged(tmp_path) == judged(straight)
    check_same_state(tmp_path, straight)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12]
    assert [line["loss"] for line in lines(tmp_path) if line["step"] == 6][1] is None


def test_a_run_killed_in_a_validation_goes_on_and_validates(cache, straight, tmp_path):
    code = (
        f"import os, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import tiny_run\n"
        "from mapet.training.validation import Validation\n"
        "add, calls = Validation._add, []\n"
        "def killing(self, *given):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), 9)\n"
        "    add(self, *given)\n"
        "Validation._add = killing\n"
        "tiny_run.main(*sys.argv[1:])"
    )
    changes = json.dumps({**HELD, "train.save_every": 2})
    killed = subprocess.run([sys.executable, "-c", code, cache, tmp_path, changes], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(judged(tmp_path)) == [3] and CheckpointStore(tmp_path / "checkpoints").newest_valid() == 4
    pretrain(make_config(cache, tmp_path, **json.loads(changes)))
    assert judged(tmp_path) == judged(straight)
    check_same_state(tmp_path, straight)


def test_data_lost_in_a_validation_ends_the_run_with_what_was_learned(cache, tmp_path, monkeypatch):
    batch = TokenCache.batch

    def lost(self, ids, share, beat):
        if share.held_out:
            raise DataError("the disk of the cache is gone")
        return batch(self, ids, share, beat)

    monkeypatch.setattr(TokenCache, "batch", lost)
    with pytest.raises(DataError, match=r"the disk of the cache is gone.*The checkpoint of step 3 is kept"):
        pretrain(make_config(cache, tmp_path, **HELD))
    monkeypatch.undo()
    pretrain(make_config(cache, tmp_path, **HELD, **{"train.max_steps": 4}))
    assert list(judged(tmp_path)) == [3, 4]


def test_another_share_does_not_go_on(cache, tmp_path):
    pretrain(make_config(cache, tmp_path, **HELD, **{"train.max_steps": 2}))
    with pytest.raises(CheckpointError, match=r"data\.held_out was 0\.25, is 0\.5"):
        pretrain(make_config(cache, tmp_path, **{"data.held_out": 0.5}))


def test_too_few_images_are_left(cache):
    config = make_config(cache, Path("o"), **{"data.held_out": 0.9})
    with pytest.raises(ConfigError, match=r"optim.global_batch 8 .*data, 4 images beside the 36 of data.held_out; low"):
        plan_steps(config, IMAGES, 1)
    with pytest.raises(ConfigError, match=r"data\.held_out must be"):
        make_config(cache, Path("o"), **{"data.held_out": 1.0})


def test_steps_follow_from_the_images_that_are_left_and_a_budget_counts_validation():
    config = make_config(Path("c"), Path("o"), **HELD, **{"train.budget": "1h"})
    steps = plan_steps(config, IMAGES, 2)
    assert (steps.per_epoch, steps.last, steps.share, steps.held_out) == (3, 12, 4, 2)
    alone = decide(config, replace(steps, held_out=0), 1.0, 0.0, 0.0).epochs
    assert (alone, decide(config, steps, 1.0, 0.0, 0.0).epochs) == (3420 // 3, 3420 // 5)


def test_what_was_judged_last_stays_on_the_screen():
    numbers = StepMetrics(30, 1.5, 4.25, {"accuracy": 0.125}, 1.5e-3, 2.0, 2225.4, 0.03, 3661.0)
    judged = replace(numbers, metrics={"accuracy": 0.125, "val_loss": 4.5, "val_accuracy": 0.25})
    assert "accuracy 12.5 % · val_loss 4.5 · val_accuracy 25.0 % · lr" in describe(judged)
    stream = io.StringIO()
    with LiveProgress(100, 0, Console(file=stream, force_terminal=True, width=200)) as display:
        display.show(judged)
        stream.truncate(0)
        display.show(replace(numbers, step=40))
        display.live.refresh()
    assert "val_loss 4.5" in stream.getvalue()


def test_every_process_makes_the_same_passes():
    """Sharded weights are gathered in every pass, so one process more or less would wait for ever."""
    for images in range(1, 17):
        passes = []
        for rank in range(4):
            learner = ToyLearner(rank, images)
            validation = Validation(learner, images)
            sums = {}
            for number in validation.batches:
                validation._add(sums, number, {"images": torch.ones(1 if learner.first(number, images) else 2)})
            passes.append((learner.task.passes, float(sums["loss"])))
        assert len({count for count, _ in passes}) == 1
        assert sum(total for _, total in passes) == images


class ToyLearner:
    """One of four processes with 2 images each of a global batch of 8, one image a pass."""

    def __init__(self, rank: int, images: int) -> None:
        self.world = World(torch.device("cpu"), rank, 4)
        self.config = make_config(Path("c"), Path("o"))
        self.steps, self.dtype = StepPlan(3, 12, share=2, micro=1, held_out=-(-images // 8)), None
        self.task = ToyTask()

    def first(self, number: int, images: int) -> bool:
        return self.world.rank * 2 >= images + (number + 1) * 8


class ToyTask:
    passes = 0

    def draw(self, images, rng):
        return {"noise": torch.rand(images, generator=rng.generator("noise"))}

    def ready(self, draws, device):
        return draws

    def __call__(self, batch, draws, *, metrics):
        self.passes += 1
        assert len(batch["images"]) == len(draws["noise"]) == 1
        return {"loss": batch["images"].mean()}
