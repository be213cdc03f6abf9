"""The fields of RunConfig by dotted name: listed with their documentation, parsed from text, changed together."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from mapet.checked import Range, shown
from mapet.config import RunConfig
from mapet.errors import ConfigError, FieldError
from mapet.objectives import OBJECTIVES, objective

REPLACED = {
    "train.activation_checkpointing": "train.recompute: none for false, blocks for true, or cheap in between",
    "train.compile": "speed.compile",
}
"""Fields of earlier versions, and what took their place."""


@dataclass(frozen=True)
class Setting:
    """One field of a section of RunConfig."""

    name: str
    """section.field"""
    kind: Any
    """Its type."""
    doc: str
    limits: Range | None = None

    @property
    def allowed(self) -> str:
        """What text may be given, in a word or two."""
        return allowed(self.kind)

    @property
    def allowed_values(self) -> str:
        """The same, and the range of a number."""
        return f"{self.allowed}, {self.limits}" if self.limits else self.allowed


@cache
def settings() -> dict[str, Setting]:
    """Every field of RunConfig by its dotted name, in the order of the source."""
    found = {}
    sections = list(typing.get_type_hints(RunConfig).items())
    sections[1:2] = [("objective", objective(name).Options) for name in OBJECTIVES]
    for section, kind in sections:
        kinds, docs = typing.get_type_hints(kind), field_docs(kind)
        annotated = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            name = f"{section}.{field.name}"
            limits = next((x for x in getattr(annotated[field.name], "__metadata__", ()) if isinstance(x, Range)), None)
            found[name] = Setting(name, kinds[field.name], docs.get(field.name, ""), limits)
    return found


def value_of(config: RunConfig, name: str) -> Any:
    """The value of a field by its dotted name."""
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Texts "section.field=value" as values by name.

    ConfigError for text of another form, an unknown name (near names are listed), a value that is not of the field's
    type, or a field that is given twice.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes SECTION.FIELD=VALUE, such as optim.lr=1e-3; got {assignment!r}")
        if name in REPLACED:
            raise ConfigError(f"--set {assignment}: {name} is now {REPLACED[name]}")
        if name not in settings():
            raise ConfigError(f"--set {assignment}: there is no field {name!r}{_near(name)}")
        if name in values:
            raise ConfigError(f"--set gives {name} twice")
        values[name] = parse_value(settings()[name], text)
    return values


def parse_value(setting: Setting, text: str) -> Any:
    """The value of a field from text; ConfigError says what is allowed."""
    try:
        return _parse(setting.kind, text)
    except ValueError:
        raise FieldError(setting.name, f"{setting.name} must be {setting.allowed}, got {shown(text)}") from None


def as_text(value: Any) -> str:
    """A value as `parse_value` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def allowed(kind: Any) -> str:
    """What text stands for a value of a type."""
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{allowed(typing.get_args(kind)[0])}, comma-separated"
    return {bool: "true|false", Path: "PATH", str: "TEXT"}.get(kind, kind.__name__.upper())


def field_docs(kind: type) -> dict[str, str]:
    """The documentation string under each field of a dataclass, as one line."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    docs = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def _parse(kind: Any, text: str) -> Any:
    if typing.get_origin(kind) is tuple:
        return tuple(_parse(typing.get_args(kind)[0], part) for part in text.split(",") if part)
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
    elif kind is bool:
        choices = {"true": True, "false": False}
    else:
        return kind(text)
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _near(name: str) -> str:
    """Names that may have been meant: the same field in another section, else names spelt alike."""
    field = name.rpartition(".")[2]
    same = [known for known in settings() if known.rpartition(".")[2] == field]
    near = same or difflib.get_close_matches(name, settings(), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else "; `mapet pretrain --list-options` lists them all"
