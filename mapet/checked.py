"""One check of values: that they have the type and range which their annotation says, and are finite.

    epochs: Annotated[int, at_least(1)] = 300

`check_fields` is called when a configuration is made; `conform` makes values of types out of JSON, checked alike.
Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import types
import typing
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from mapet.errors import ConfigError, FieldError

SHOWN = 80


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, these included unless `open_low`, `open_high`; None for no limit."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    absurd_above: bool = False
    """Whether `high` only keeps out absurd values: an error then names the limit that was passed, not both."""

    def __contains__(self, value: float) -> bool:
        return self._high_enough(value) and (
            self.high is None or value < self.high or (value == self.high and not self.open_high)
        )

    def allowed_near(self, value: float) -> str:
        """What would be allowed, for a value that is not."""
        return f"at most {self.high}" if self.absurd_above and self._high_enough(value) else self.allowed

    @property
    def allowed(self) -> str:
        """What is allowed, without a limit that only keeps out absurd values."""
        return str(Range(self.low, open_low=self.open_low) if self.absurd_above else self)

    def _high_enough(self, value: float) -> bool:
        return self.low is None or value > self.low or (value == self.low and not self.open_low)

    def __str__(self) -> str:
        if self.high is None:
            if self.low == 0:
                return "positive" if self.open_low else "not negative"
            return f"above {self.low}" if self.open_low else f"at least {self.low}"
        if self.low is None:
            return f"below {self.high}" if self.open_high else f"at most {self.high}"
        return f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


def at_least(low: float, most: float | None = None) -> Range:
    """From `low` on, up to `most`, which keeps out absurd values."""
    return Range(low, most, absurd_above=most is not None)


def above(low: float, most: float | None = None) -> Range:
    """More than `low`, up to `most`, which keeps out absurd values."""
    return Range(low, most, open_low=True, absurd_above=most is not None)


def fraction(*, one: bool = True, zero: bool = True) -> Range:
    """From 0 to 1; whether these two belong to it."""
    return Range(0, 1, open_low=not zero, open_high=not one)


SEED = Range(0, 2**63 - 1)
"""Seeds that every random generator takes."""


def check_fields(values: Any, prefix: str = "") -> None:
    """FieldError unless every field of a dataclass fits its annotation; `prefix` goes before its name in the text."""
    for name, hint in hints(type(values)).items():
        check(hint, getattr(values, name), f"{prefix}{name}")


def check(hint: Any, value: Any, name: str) -> None:
    """FieldError unless the value is as its annotation says."""
    try:
        conform(hint, value, name)
    except ValueError as error:
        raise FieldError(name, str(error)) from None


def conform(hint: Any, value: Any, name: str) -> Any:
    """The value as its annotation says: numbers, text, bool, None, Path, Literal, list, tuple, dict, dataclass, Any.

    Lists become tuples, text paths, dicts dataclasses, where that is the type; numbers are finite. ValueError names
    what does not fit.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        result = conform(arguments[0], value, name)
        for limit in arguments[1:]:
            if isinstance(limit, Range) and result is not None and result not in limit:
                raise ValueError(f"{name} must be {limit.allowed_near(result)}, got {shown(value)}")
        return result
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, name)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, got {shown(value)}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, name)
    if origin in (list, tuple):
        return _sequence(origin, arguments, value, name)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a mapping, got {shown(value)}")
        key, kind = arguments
        return {conform(key, k, f"a key of {name}"): conform(kind, v, f"{name}.{k}") for k, v in value.items()}
    return _plain(hint, value, name)


def _plain(kind: Any, value: Any, name: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) > 2**1023:
            raise ValueError(f"{name} must be a finite number, got {shown(value)}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
        return float(value)
    if kind is Path and isinstance(value, str | os.PathLike):
        if "\0" in os.fspath(value):
            raise ValueError(f"{name} must not hold a NUL, got {shown(value)}")
        return Path(value)
    if kind is int and hasattr(value, "__index__") and not isinstance(value, bool):
        with suppress(TypeError):  # of a tensor of several numbers
            return operator.index(value)
    if kind in (str, bool, dict, list) and isinstance(value, kind):
        return value
    if kind in (type(None), None) and value is None:
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    raise ValueError(f"{name} must be {words.get(kind, getattr(kind, '__name__', kind))}, got {shown(value)}")


def _one_of(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    errors = []
    for kind in kinds:
        try:
            return conform(kind, value, name)
        except ValueError as error:
            errors.append((kind is type(None), str(error)))
    raise ValueError(min(errors)[1])


def _sequence(origin: type, kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, got {shown(value)}")
    if origin is tuple and (len(kinds) != 2 or kinds[1] is not Ellipsis):
        if len(kinds) != len(value):
            raise ValueError(f"{name} must have {len(kinds)} entries, got {len(value)}")
        return tuple(conform(kind, part, f"{name}[{i}]") for i, (kind, part) in enumerate(zip(kinds, value)))  # noqa: B905
    return origin(conform(kinds[0], part, f"{name}[{i}]") for i, part in enumerate(value))


def environment_number(name: str, default: int | None = 1) -> int:
    """A number that torchrun puts into the environment. ConfigError where it is none, or missing without a default."""
    text = os.environ.get(name) or default
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {text!r} in a run of several processes; start them with torchrun") from None


def _build(kind: type, values: Any, name: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a mapping, got {shown(values)}")
    kinds = hints(kind)
    if unknown := [key for key in values if key not in kinds]:
        raise ValueError(f"{name} has an unknown entry {shown(unknown[0])}")
    needed = {field.name for field in dataclasses.fields(kind) if not _has_default(field)}
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    return kind(**{key: conform(kinds[key], value, f"{name}.{key}") for key, value in values.items()})


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@cache
def hints(kind: type) -> dict[str, Any]:
    """The annotation of every field of a dataclass."""
    found = typing.get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def shown(value: Any) -> str:
    """A value for an error, not endlessly long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
