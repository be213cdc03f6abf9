"""From arguments to options, by tyro; and fields in messages as they are typed, --lr for optim.lr.

A run's options are parsed twice from the same dataclasses: first recipe, model and objective, which choose the
defaults, then everything over these.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial, reduce
from itertools import pairwise
from operator import or_
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from mapet.checked import Range, check_fields
from mapet.commands.options import COMMANDS, EXAMPLES, Run, Start
from mapet.config import ModelConfig, ObjectiveConfig, RunConfig, Typed, change, field_notes
from mapet.errors import ConfigError, FieldError, MapetError
from mapet.recipes import RECIPES, recipe

ABOUT = "Pre-train vision transformers by masked and permuted visual tokens (MaPeT)."


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """The name of the sub-command and its options. SystemExit after --help, and with code 2 for what is no option.

    ConfigError for values that cannot work; FieldError names the option.
    """
    name, *rest = arguments
    if name not in COMMANDS:
        kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
        _tyro(reduce(or_, kinds), arguments, prog="mapet", description=ABOUT)  # --help, or what is wrong
        raise ConfigError(f"begin with one of {', '.join(COMMANDS)}; got {name!r}")
    if issubclass(kind := COMMANDS[name], Run):
        options = _parse_run(name, kind, rest)
    else:
        switches = (tyro.conf.FlagCreatePairsOff,)
        options = _tyro(kind, rest, prog=f"mapet {name}", **_described(kind, name), config=switches)
    try:
        check_fields(options)
    except FieldError as error:
        option = f"--{error.name.replace('_', '-')}"
        raise FieldError(error.name, f"{option}{str(error).removeprefix(error.name)}") from None
    return name, options


def _parse_run(name: str, kind: type[Run], arguments: list[str]) -> Run:
    """Options of a command about a run: a recipe, a model and a method choose the defaults of all others."""
    prog = f"mapet {name}"
    try:
        start, rest = _tyro(
            Start, arguments, prog=prog, add_help=False, return_unknown_args=True, console_outputs=False
        )
    except SystemExit:  # a value is missing, which is said the second time
        start, rest = Start(), []
    run = recipe(start.recipe) if start.recipe else RunConfig()
    if start.preset:
        preset = ModelConfig.preset(start.preset)
        run = change(run, {"model.width": preset.width, "model.heads": preset.heads})
    if start.method:
        run = change(run, {"objective.name": start.method})
    _check_typed(rest, run)
    about = RECIPES[start.recipe] if start.recipe else kind
    return _tyro(kind, arguments, prog=prog, **_described(about, name), default=kind(run=run))


def _check_typed(arguments: list[str], run: RunConfig) -> None:
    """ConfigError for an option of another method, what is typed otherwise, and options that contradict each other."""
    names, given = option_names(), []
    own = [f"objective.{name}" for name in vars(run.objective) if name != "name"]
    field_of = {option: name for name, options in names.items() for option in options}
    for argument, following in pairwise([*arguments, ""]):
        option, _, value = argument.partition("=")
        if option == "--set":
            name, _, value = (value or following or "SECTION.FIELD=VALUE").partition("=")
            section, _, name = name.replace("_", "-").partition(".")
            switch = {"true": f"--{section}.{name}", "false": f"--{section}.no-{name}"}.get(value)
            instead = (switch or f"--{section}.{name} {value}") if name and value else "--SECTION.FIELD VALUE"
            raise ConfigError(f"--set is no option any more; type {instead}")
        field = field_of.get(option.replace("_", "-"))
        if field == "objective.name":
            raise ConfigError(f"{option} is typed --objective NAME")
        if field and field.startswith("objective.") and field not in own:
            has = ", ".join(names[name][0] for name in own) or "none"
            raise ConfigError(f"{option}: the objective {run.objective.name} has no such option; it has {has}")
        if field:
            given.append(field)
    if {"train.budget", "optim.epochs"} <= set(given):
        raise ConfigError("a budget sets the epochs: give --budget or --epochs, not both")


def option_names() -> dict[str, list[str]]:
    """The options of a run by the field that they set: the short one, where there is one, and --section.field."""
    names = {"objective.name": ["--objective"]}
    for name, notes in field_notes().items():
        aliases = [note.short for note in notes if isinstance(note, Typed) and note.short]
        names.setdefault(name, aliases).append(f"--{name.replace('_', '-')}")
    return names


def as_typed(text: str) -> str:
    """A message about a run with its fields as they are typed: --lr for optim.lr, --train.keep for train.keep."""
    names = option_names()
    fields = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({fields})\b(?![/-]|\.\w)", lambda found: names[found[0]][0], text)


def _described(about: Any, name: str) -> dict[str, str]:
    """What a command, or a recipe, is about: before its options, and what is left to say, with examples, after them."""
    wrap = partial(textwrap.fill, width=shutil.get_terminal_size().columns, break_on_hyphens=False)
    first, *more = (inspect.getdoc(about) or "").split("\n\n")
    more = [part if part.startswith(" ") else wrap(part) for part in more]
    examples = "\n".join(f"  {line}" for line in EXAMPLES[name])
    # tyro joins lines that begin with a letter.
    return {"description": wrap(first, subsequent_indent="  "), "after": "\n\n".join((*more, f"Examples:\n{examples}"))}


def _tyro(kind: Any, arguments: Sequence[str], *, after: str = "", **options: Any) -> Any:
    """`tyro.cli`, with a text after the help, where errors of a configuration's own checks are raised as they are."""
    said, outer = io.StringIO(), sys.exception()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, args=list(arguments), registry=_WITH_RANGES, **options)
    except SystemExit as stop:
        cause = stop.__context__
        while cause and cause is not outer:
            if isinstance(cause, MapetError):
                raise cause from None
            cause = cause.__context__
        print(said.getvalue(), end="", file=sys.stderr)
        if stop.code == 0:  # after the help; flushed here, where it is no bug that nobody reads it
            print(after, end="\n" * bool(after), flush=True)
        raise


_WITH_RANGES = ConstructorRegistry()
_inside: list[Any] = []


@_WITH_RANGES.struct_rule
def _with_ranges(info: StructTypeInfo) -> StructConstructorSpec | None:
    """What tyro makes of a dataclass, with the range of numbers in their help, and without the name of a method."""
    if not dataclasses.is_dataclass(info.type) or info.type in _inside:
        return None
    _inside.append(info.type)
    try:
        found = ConstructorRegistry.get_struct_spec(info)
    finally:
        _inside.pop()
    return dataclasses.replace(found, fields=tuple(_with_range(field, info.type) for field in found.fields))


def _with_range(field: StructFieldSpec, kind: Any) -> StructFieldSpec:
    notes = getattr(field.type, "__metadata__", ())
    allowed = "".join(f"; {note}" for note in notes if isinstance(note, Range))
    hint = tyro.conf.arg(help_behavior_hint=lambda value: f"(default: {value.strip(chr(39)) or 'none'}{allowed})")
    hidden = (tyro.conf.Fixed, tyro.conf.Suppress) if field.name == "name" and issubclass(kind, ObjectiveConfig) else ()
    text = field.helptext() if callable(field.helptext) else field.helptext
    text = text and " ".join(text.split())  # tyro keeps some line ends
    typed = [
        tyro.conf.arg(aliases=(note.short,) if note.short else None, metavar=note.example or None)
        for note in notes
        if isinstance(note, Typed)
    ]
    return dataclasses.replace(field, type=Annotated[(field.type, *hidden, hint, *typed, *notes)], helptext=text)
