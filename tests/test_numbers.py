"""Values are finite, typed and in range when they are given; what is saved is finite (assertions 28 and 29)."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path

import pytest
import torch
from command_line import TRAINING, everything_in, pictures
from tiny_run import make_cache, make_config

from mapet.checked import Range, at_least, fraction
from mapet.commands.options import COMMANDS
from mapet.commands.parsing import option_names
from mapet.config import ModelConfig, OptimConfig, RunConfig
from mapet.errors import ConfigError, FieldError, TrainingError
from mapet.evaluate.frozen import EvaluationConfig
from mapet.evaluate.probe import ProbeConfig
from mapet.tokenizers.pixel import PixelTokenizer
from mapet.training.checkpoint import CheckpointState, CheckpointStore, not_finite
from mapet.training.learner import Learner
from mapet.training.loop import pretrain
from mapet.training.metrics import MetricsLog, keep_until
from mapet.units import parse_bytes, parse_count, parse_duration, parse_link
from mapet_kernels import kmeans

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def numbers(kind: type) -> dict[str, list[typing.Any]]:
    """The numeric fields of a dataclass, and the parts of their annotations."""
    hints = typing.get_type_hints(kind, include_extras=True)
    plain = typing.get_type_hints(kind)
    return {name: getattr(hints[name], "__metadata__", ()) for name in plain if plain[name] in (int, float)}


@pytest.mark.parametrize("section", ["model", "data", "optim", "train", "speed"])
def test_every_number_of_a_run_has_a_range_and_is_finite(section):
    values = getattr(RunConfig(), section)
    for name, notes in numbers(type(values)).items():
        assert any(isinstance(note, Range) for note in notes), name
        for wrong in (NAN, INF, -INF, "1", None, True, -5, 10**400):
            with pytest.raises(FieldError, match=rf"^{section}\.{name} ") as error:
                dataclasses.replace(values, **{name: wrong})
            assert error.value.name == f"{section}.{name}" and len(str(error.value)) < 300


@pytest.mark.parametrize("command", ["tokenize", "plan", "probe", "codebook", "demo"])
def test_every_number_of_a_command_has_a_range(command):
    for name, notes in numbers(COMMANDS[command]).items():
        assert any(isinstance(note, Range) for note in notes), name


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ModelConfig, "mlp_ratio", 1e-3),
        (ModelConfig, "mlp_ratio", 1e9),
        (ModelConfig, "width", 192.0),
        (ModelConfig, "vocabulary", 65537),
        (ModelConfig, "class_token", 1),
        (OptimConfig, "beta1", 1.0),
        (OptimConfig, "eps", 0.0),
        (OptimConfig, "schedule_per", "day"),
        (ProbeConfig, "lr", NAN),
        (ProbeConfig, "batch", -1),
        (EvaluationConfig, "temperature", INF),
        (EvaluationConfig, "neighbours", 0),
    ],
)
def test_single_fields(kind, field, value):
    with pytest.raises(FieldError, match=field):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.min_lr", "nan"),
        ("optim.weight_decay", "inf"),
        ("optim.weight_decay", "-1"),
        ("optim.cooldown_epochs", "-100"),
        ("optim.warmup_lr", "-1e-3"),
        ("optim.beta2", "nan"),
        ("optim.eps", "-1"),
        ("model.mlp_ratio", "nan"),
        ("train.keep", "999999999999"),
        ("train.seed", "-1"),
        ("train.gpu_memory", "9" * 400 + "GB"),
        ("train.gpu_memory", "a lot"),
    ],
)
def test_a_field_is_refused_at_once_and_named_as_typed(name, value, mapet, cache, tmp_path):
    option = f"--{name.replace('_', '-')}"
    given = ("--cache", cache, "--output", tmp_path / "run", *TRAINING, f"{option}={value}")
    outcome = mapet.fail("pretrain", *given, code=2, names=(option_names()[name][0],))
    assert len(outcome.err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "option", "value", "said"),
    [
        ("pretrain", "--lr", "nan", "--lr must be a finite number, got nan"),
        ("pretrain", "--lr", "1e30", "--lr must be at most 1000.0, got 1e+30"),
        ("pretrain", "--lr", "-1", "--lr must be positive, got -1.0"),
        ("pretrain", "--seed", str(2**64), "--seed must be in [0, "),
        ("pretrain", "--workers", "-1", "--workers must be at least 0, got -1"),
        ("pretrain", "--cut", "0", "--cut must be in [1, 196] with 197 tokens an image"),
        ("pretrain", "--gpus", "0", "--gpus must be at least 1, got 0"),
        ("plan", "--batch", str(10**12), "--batch must be at most"),
        ("plan", "--micro-batch", "-3", "--micro-batch must be at least 0, got -3"),
        ("plan", "--gpus", str(10**30), "--gpus must be at most"),
        ("probe", "--batch-size", "-4", "--batch-size must be at least 1, got -4"),
        ("probe", "--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("probe", "--test-fraction", "1", "--test-fraction must be in (0, 1), got 1.0"),
        ("probe", "--lr", "inf", "--lr must be a finite number, got inf"),
        ("tokenize", "--shard-images", "-1", "--shard-images must be at least 0, got -1"),
        ("tokenize", "--max-skipped", "nan", "--max-skipped must be a finite number, got nan"),
        ("tokenize", "--fit-tolerance", "1", "--fit-tolerance must be in [0, 1), got 1.0"),
        ("codebook", "--rows", "0", "--rows must be at least 1, got 0"),
        ("demo", "--seeds", "0", "--seeds must be at least 1, got 0"),
    ],
)
def test_options_are_refused_as_typed_before_anything_heavy(command, option, value, said, mapet, tmp_path, monkeypatch):
    needed = {"probe": ("--checkpoint", "x", "--images", "y"), "codebook": ("--cache", "x")}.get(command, ())
    monkeypatch.chdir(tmp_path)
    if command not in ("pretrain", "plan"):
        monkeypatch.setitem(sys.modules, f"mapet.commands.{command}", None)  # importing it would fail
    outcome = mapet.fail(command, *needed, option, value, code=2, names=(said.replace("at least 0", "not negative"),))
    assert len(outcome.err.splitlines()) == 1 and not everything_in(tmp_path)


def test_compile_with_a_tokenizer_without_network_is_refused_before_the_fit(mapet, tmp_path, monkeypatch):
    monkeypatch.setattr(PixelTokenizer, "fit", lambda *a, **k: pytest.fail("it fitted first"))
    images = pictures(tmp_path / "images", per_class=2)
    given = ("--images", images, "--output", tmp_path / "c", "--image-size", 16, "--patch-size", 4, "--vocabulary", 16)
    mapet.fail("tokenize", *given, "--compile", "--workers", 0, code=2, names=("--compile", "kclip"))


def test_a_range_says_which_side_was_passed():
    assert at_least(1, 9).allowed_near(0) == "at least 1" and at_least(1, 9).allowed_near(10) == "at most 9"
    assert fraction(one=False).allowed_near(1) == "in [0, 1)"


@pytest.mark.parametrize("parse", [parse_bytes, parse_count, parse_duration, parse_link])
@pytest.mark.parametrize("number", ["9" * 400, "9" * 30, "\N{ARABIC-INDIC DIGIT FIVE}", "nan", "-1"])
def test_absurd_amounts_are_refused(parse, number):
    unit = {parse_bytes: "GB", parse_count: "", parse_duration: "h", parse_link: "Gb"}[parse]
    with pytest.raises(ConfigError, match="got"):
        parse(f"{number}{unit}")


@pytest.mark.parametrize(
    ("changes", "error"), [({"clusters": 2.0}, TypeError), ({"seed": "1"}, TypeError), ({"tolerance": NAN}, ValueError)]
)
def test_settings_of_kmeans(changes, error):
    with pytest.raises(error, match=next(iter(changes))):
        kmeans.Settings(**{"clusters": 2, **changes})


class TestSaving:
    """Assertion 29."""

    def state(self, **moments) -> CheckpointState:
        return CheckpointState({"w": torch.ones(3)}, {"optimizer": {"state": {0: moments}}}, {}, {"w": torch.ones(3)})

    def test_the_first_tensor_that_is_not_finite_is_named(self):
        assert not_finite(self.state(exp_avg=torch.zeros(3), step=torch.ones(()))) == ""
        assert "exp_avg_sq of weight 0" in not_finite(self.state(exp_avg_sq=torch.tensor([1.0, INF])))
        state = self.state()
        state.ema["w"][1] = NAN
        assert not_finite(state) == "the moving average of w"

    def broken(self, monkeypatch, at: int) -> None:
        """A run whose weights become infinite in an update, as an absurd one may make them."""
        step = Learner.step

        def spoiled(learner, number, batch, **options):
            step(learner, number, batch, **options)
            if number == at:
                learner.task.model.norm.weight.data[0] = INF

        monkeypatch.setattr(Learner, "step", spoiled)

    @pytest.mark.parametrize("ema_decay", [0.0, 0.9])
    def test_weights_that_are_not_finite_are_not_saved(self, ema_decay, cache, tmp_path, monkeypatch):
        self.broken(monkeypatch, at=3)
        changes = {"train.save_every": 2, "train.ema_decay": ema_decay, "train.log_every": 1000}
        with pytest.raises(TrainingError, match=r"after step 4: weight .*norm.weight is not finite.*newest of step 2"):
            pretrain(make_config(cache, tmp_path, **changes))
        store = CheckpointStore(tmp_path / "checkpoints")
        assert store.steps() == [2] and not_finite(store.load(2).state) == ""

    def test_a_failure_does_not_claim_that_the_weights_are_whole(self, cache, tmp_path, monkeypatch):
        self.broken(monkeypatch, at=3)
        with pytest.raises(TrainingError, match=r"step 4 .*weight model.norm.weight is not finite any more") as error:
            pretrain(make_config(cache, tmp_path, **{"train.log_every": 1}))
        assert "before the weights changed" not in str(error.value) and "there is no checkpoint" in str(error.value)

    @pytest.mark.parametrize("lr", [1e3, 1e2])
    def test_an_absurd_rate_never_leaves_a_checkpoint_that_is_not_finite(self, lr, cache, tmp_path):
        wild = {"optim.lr": lr, "optim.weight_decay": 1e3, "optim.clip": 0.0, "optim.warmup_epochs": 0}
        with pytest.raises(TrainingError, match=r"optim\.lr"):
            pretrain(make_config(cache, tmp_path, **wild, **{"train.save_every": 1}))
        store = CheckpointStore(tmp_path / "checkpoints")
        assert all(not_finite(store.load(step).state) == "" for step in store.steps())


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "-Infinity", "null"])
def test_assertion_07_no_resumed_line_that_is_not_finite_is_the_best(loss, tmp_path):
    lines = [f'{{"step": 1, "loss": {loss}}}', '{"step": 2, "loss": 3.5}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with MetricsLog(tmp_path, 3) as log:
        assert (log.best_loss.step, log.best_loss.value) == (2, 3.5)
    assert [line["step"] for line in keep_until(tmp_path / "metrics.jsonl", 9)] == [1, 2, 3]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert all(json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
