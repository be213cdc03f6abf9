"""The command `mapet`: find the sub-command, run it, and turn expected failures into a line on stderr and an exit code.

Each sub-command is a dataclass in mapet/options.py and a `run(options) -> int` in mapet/commands/. The latter import
torch, so they are imported when they are wanted: `mapet --help` does not wait for them.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated

import tyro

from mapet import __version__
from mapet.errors import MapetError
from mapet.options import COMMANDS

ABOUT = "Pre-train vision transformers by masked and permuted visual tokens (MaPeT)."
INTERRUPTED = 130
PACKAGE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `arguments` without the program's name, by default those of the process.

    Returns the exit code: 0, that of a MapetError (2 for options that cannot work, else 1), or 130 after Ctrl-C. An
    option that cannot be parsed is a SystemExit with code 2. Other exceptions are bugs and keep their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if arguments == ["--version"]:
        print(f"mapet {__version__}")
        return 0
    with readable_warnings():
        try:
            name, options = parse(arguments)
            return importlib.import_module(f"mapet.commands.{name}").run(options)
        except MapetError as error:
            complain("error", error)
            return error.exit_code
        except KeyboardInterrupt as interrupt:
            complain("interrupted", str(interrupt) or "stopped by Ctrl-C; what was unfinished has been removed")
            return INTERRUPTED
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            complain("error", f"the disk is full ({error}); make room and run the command again")
            return MapetError.exit_code


def parse(arguments: Sequence[str]) -> tuple[str, object]:
    """The name of the sub-command and its options. SystemExit after --help, and with code 2 for bad options."""
    kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
    options = tyro.cli(
        reduce(or_, kinds),
        prog="mapet",
        description=ABOUT,
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return next(name for name, kind in COMMANDS.items() if type(options) is kind), options


def complain(what: str, text: object) -> None:
    """One message on stderr, with the number of the process when torchrun started several."""
    process = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE") or 1) > 1 else ""
    print(f"mapet: {what}{process}: {text}", file=sys.stderr, flush=True)


@contextmanager
def readable_warnings() -> Iterator[None]:
    """Warnings of mapet are messages to the user, without file and line; those of other packages stay as they are."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            if Path(filename).is_relative_to(PACKAGE):
                complain("warning", message)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield
