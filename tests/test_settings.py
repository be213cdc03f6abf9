"""Fields of RunConfig by dotted name: listing, text to values and back, changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mapet.commands.settings import as_text, change, parse_assignments, parse_value, settings, value_of
from mapet.config import RunConfig, to_dict
from mapet.errors import ConfigError


def test_every_field_is_there_with_its_documentation():
    fields = {f"{section}.{field}" for section, values in to_dict(RunConfig()).items() for field in values}
    assert set(settings()) == fields
    assert settings()["optim.clip"].doc == "Largest global gradient norm; 0 turns clipping off."
    wrapped = settings()["objective.cut"].doc
    assert "50 for ViT-T and ViT-S, 60 for ViT-B" in wrapped and "\n" not in wrapped and "  " not in wrapped
    undocumented = [name for name, setting in settings().items() if not setting.doc]
    assert undocumented == ["optim.warmup_epochs", "optim.beta1", "optim.beta2", "optim.eps"], "their names say it"


@pytest.mark.parametrize("name", settings())
def test_a_value_survives_text(name):
    config = dataclasses.replace(
        RunConfig(), train=dataclasses.replace(RunConfig().train, trackers=("wandb", "trackio"))
    )
    value = value_of(config, name)
    parsed = parse_value(settings()[name], as_text(value))
    assert parsed == value and type(parsed) is type(value)


def test_assignments_of_every_kind():
    given = [
        "model.class_token=false",
        "optim.lr=2e-4",
        "optim.epochs=17",
        "data.cache=some/where=else",
        "objective.name=pim",
        "train.trackers=trackio",
    ]
    config = change(RunConfig(), parse_assignments(given))
    assert config.model.class_token is False and config.optim.lr == 2e-4 and config.optim.epochs == 17
    assert config.data.cache == Path("some/where=else")
    assert (config.objective.name, config.train.trackers) == ("pim", ("trackio",))
    assert config.optim.global_batch == 2048, "the rest is as it was"


def test_fields_that_are_valid_only_together():
    values = parse_assignments(["optim.epochs=5", "optim.warmup_epochs=2", "model.heads=5", "model.width=40"])
    assert change(RunConfig(), values).model.head_size == 8


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lr", "SECTION.FIELD=VALUE"),
        ("optim.lrr=1", r"no field 'optim.lrr'; did you mean optim.lr\b"),
        ("lr=1", "did you mean optim.lr"),
        ("train.epochs=1", "did you mean optim.epochs"),
        ("what.ever=1", "--list-options"),
        ("optim.epochs=1.5", "optim.epochs must be INT, got '1.5'"),
        ("optim.lr=fast", "optim.lr must be FLOAT"),
        ("speed.compile=yes", r"speed.compile must be true\|false, got 'yes'"),
        ("train.precision=fp8", r"train.precision must be fp32\|bf16\|fp16\|auto"),
        ("train.trackers=wandb,mlflow", "train.trackers must be"),
        ("optim.lr=-1", "optim.lr must be positive"),
    ],
)
def test_what_cannot_be_set(assignment, message):
    with pytest.raises(ConfigError, match=message):
        change(RunConfig(), parse_assignments([assignment]))


def test_a_field_given_twice():
    with pytest.raises(ConfigError, match="gives optim\\.lr twice"):
        parse_assignments(["optim.lr=1", "optim.lr=2"])
