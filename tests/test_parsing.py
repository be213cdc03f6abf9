"""The options of a run: what chooses defaults, how each field is typed, and what is refused in which words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest

from mapet.checked import fraction
from mapet.commands.parsing import option_names, parse
from mapet.commands.pretrain import run_config
from mapet.config import ObjectiveConfig, RunConfig, field_notes, from_dict, short, to_dict
from mapet.errors import ConfigError
from mapet.objectives import OBJECTIVES


def config(*arguments: object, command: str = "pretrain") -> RunConfig:
    return parse([command, *map(str, arguments)])[1].run


def test_every_field_is_an_option_of_its_own():
    fields = {f"{section}.{field}" for section, values in to_dict(RunConfig()).items() for field in values}
    assert fields < set(field_notes()) and "objective.masked" in field_notes()
    options = [option for options in option_names().values() for option in options]
    assert len(options) == len(set(options))
    assert option_names()["optim.global_batch"] == ["--batch", "--optim.global-batch"]


def test_values_of_every_kind_and_both_names():
    given = ("--model.no-class-token", "--lr=2e-4", "--optim.epochs", 17, "--data.cache", "some/where=else")
    run = config(*given, "--objective", "pim", "--train.trackers", "trackio", "wandb", "--micro_batch", 4)
    assert run.model.class_token is False and run.optim.lr == 2e-4 and run.optim.epochs == 17
    assert run.data.cache == Path("some/where=else") and run.train.micro_batch == 4
    assert (run.objective.name, run.train.trackers) == ("pim", ("trackio", "wandb"))
    assert run.optim.global_batch == 2048, "the rest is as it was"
    assert config() == RunConfig() and config("--epochs=5", "--warmup-epochs=2").optim.warmup_epochs == 2


@pytest.mark.parametrize("command", ["pretrain", "plan"])
def test_recipe_model_and_objective_choose_the_defaults(command):
    run = config("--recipe", "vit_small_kclip", "--batch", 64, "--optim.beta2", 0.95, command=command)
    assert (run.model.width, run.objective.cut, run.optim.lr) == (384, 50, 1.5e-3)
    assert (run.optim.global_batch, run.optim.beta2, run.train.precision) == (64, 0.95, "fp16")
    run = config("--model.heads", 6, "--model", "base", command=command)
    assert (run.model.width, run.model.heads) == (768, 6)
    run = config("--recipe", "vit_base_kclip", "--objective", "pim", command=command)
    assert to_dict(run)["objective"] == {"name": "pim", "cut": 60}, "what both methods have is kept"


def test_mim_masks_75_patches_whatever_the_recipe():
    run = config("--objective", "mim", "--recipe", "vit_base_kclip")
    assert to_dict(run)["objective"] == {"name": "mim", "masked": 75} and from_dict(to_dict(run)) == run
    assert config("--objective", "mim", "--masked", 98, command="plan").objective.masked == 98


def test_a_method_of_ones_own_has_its_options(mapet, monkeypatch):
    @dataclass(frozen=True)
    class ToyConfig(ObjectiveConfig):
        """A toy."""

        name: Literal["toy"] = "toy"
        share: Annotated[float, fraction(), short("--share")] = 0.5
        """What is hidden."""

    import mapet.objectives.mapet as module

    monkeypatch.setattr(module, "Toy", SimpleNamespace(Options=ToyConfig), raising=False)
    monkeypatch.setitem(OBJECTIVES, "toy", "mapet.objectives.mapet:Toy")
    assert config("--objective", "toy", "--share", 0.25).objective == ToyConfig(share=0.25)
    assert config("--objective.share", 0.25, "--objective=toy").objective == ToyConfig(share=0.25)
    assert "--share FLOAT, --objective.share FLOAT" in mapet.succeed("plan", "--objective", "toy", "--help").out
    mapet.fail("plan", "--objective", "toy", "--share", 2, code=2, names=("--share must be in [0, 1]",))
    mapet.fail("plan", "--share", 1, code=2, names=("--share: the objective mapet has no such option; it has --cut",))


def test_fresh_does_not_resume():
    assert run_config(parse(["pretrain", "--fresh"])[1]).train.resume is False


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--recipe", "vit_huge"), ("--recipe vit_huge", "vit_base_kclip")),
        (("--model", "huge"), ("'huge'", "tiny, small, base")),
        (("--objective", "beit"), ("'beit'", "mapet, pim, mim")),
        (("--objective", "mim", "--cut", 60), ("--cut: the objective mim has no such option; it has --masked",)),
        (("--objective.masked=60",), ("--objective.masked: the objective mapet has no such option; it has --cut",)),
        (("--objective.name", "pim"), ("--objective NAME",)),
        (("--set", "optim.global_batch=9"), ("--optim.global-batch 9",)),
        (("--set=speed.compile=true",), ("type --speed.compile",)),
        (("--set=model.class_token=false",), ("type --model.no-class-token",)),
        (("--set",), ("type --SECTION.FIELD VALUE",)),
        (("--lr", -1), ("--lr must be positive, got -1.0",)),
        (("--optim.clip", "nan"), ("--optim.clip must be a finite number",)),
        (("--model.heads", 5), ("--model.heads 5 does not divide --model.width 192",)),
        (("--gpu-memory", "much"), ("--gpu-memory", "16GB")),
    ],
)
def test_what_cannot_work_is_an_error_of_one_line(arguments, names, mapet):
    outcome = mapet.fail("pretrain", *arguments, code=2, names=names)
    assert len(outcome.err.splitlines()) == 1 and not outcome.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--optim.lrr", 9), ("--optim.lrr", "--lr, --optim.lr FLOAT", "Peak learning rate.")),
        (("--lr", "7x"), ("--lr/--optim.lr", "'7x'", "FLOAT")),
        (("--epochs", 1.5), ("--epochs/--optim.epochs", "'1.5'", "INT")),
        (("--precision", "fp8"), ("--precision/--train.precision", "'fp8'", "'bf16'")),
        (("--train.trackers", "wandb", "mlflow"), ("--train.trackers", "'mlflow'", "'wandb', 'trackio'")),
        (("--recipe",), ("'--recipe'", "Missing value")),
        (("--global-batch", 9), ("--batch, --optim.global-batch INT",)),
    ],
)
def test_what_cannot_be_parsed_is_told_with_what_was_meant(arguments, said, mapet, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = mapet("pretrain", *arguments)
    assert outcome.code == 2 and not outcome.out and "mapet pretrain --help" in outcome.err
    for part in said:
        assert part in outcome.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--budget", "1h", "--epochs", "3"], "give --budget or --epochs, not both"),
        (["--set", "lr"], "type --SECTION.FIELD VALUE"),
        (["--epochs", "3"], r"warmup_epochs must be in \[0, epochs = 3\], got 10, the default"),
    ],
)
def test_what_contradicts_or_is_typed_otherwise_is_told(typed, said):
    with pytest.raises(ConfigError, match=said):
        parse(["pretrain", *typed])
