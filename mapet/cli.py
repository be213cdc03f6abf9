"""The command `mapet`: find the sub-command, run it, and turn expected failures into a line on stderr and an exit code.

Each sub-command is a dataclass in commands/options.py and a `run(options) -> int` in mapet/commands/. The latter import
torch, so they are imported when they are wanted: `mapet --help` does not wait for them.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mapet import __version__
from mapet.commands.options import COMMANDS, Run
from mapet.commands.parsing import as_typed, parse
from mapet.errors import MapetError
from mapet.words import printable

INTERRUPTED, BROKEN_PIPE = 130, 141
OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|storage size calculation overflowed", re.I
)
"""What torch says in a RuntimeError when a tensor does not fit."""
PACKAGE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `arguments` without the program's name, by default those of the process.

    Returns the exit code: 0; that of a MapetError (2 for options that cannot work, else 1); 1 for what disk, memory or
    damaged data refuse; 130 after Ctrl-C; 141 when nobody reads the output any more. An option that cannot be parsed is
    a SystemExit with code 2. Other exceptions are bugs and keep their traceback.
    """
    is_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as the process is
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    with readable_warnings():
        try:
            if arguments == ["--version"]:
                print(f"mapet {__version__}")
                return 0
            name, options = parse(arguments)
            code = importlib.import_module(f"mapet.commands.{name}").run(options)
            sys.stdout.flush()
            return code
        except MapetError as error:
            kind = COMMANDS.get(arguments[0])
            complain("error", as_typed(str(error)) if kind and issubclass(kind, Run) else error)
            return error.exit_code
        except KeyboardInterrupt as interrupt:
            if is_process:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends anyway; a second one has nothing to add
            complain("interrupted", str(interrupt) or "stopped by Ctrl-C; what was unfinished has been removed")
            return INTERRUPTED
        except BrokenPipeError as error:
            if not nobody_reads():
                complain("error", error)
                return MapetError.exit_code
            return BROKEN_PIPE
        except (OSError, MemoryError, RecursionError, UnicodeError, RuntimeError) as error:
            text = in_words(error)
            if text is None:
                raise
            complain("error", text)
            return MapetError.exit_code


def in_words(error: Exception) -> str | None:
    """What went wrong outside of the program, for the person; None for a bug."""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full ({error}); make room and run the command again"
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{error.strerror or error}: {names}" if names else str(error) or type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return f"this does not fit into memory ({error or 'no more is to be had'}): choose smaller sizes"
    if isinstance(error, RecursionError):
        return f"something that was read is nested too deeply ({error})"
    if isinstance(error, UnicodeError):
        return f"a name or a text is not encoded as it should be ({error})"
    return None


def nobody_reads() -> bool:
    """Whether the reader of stdout is gone, as in `mapet ... | head`; what is left to print is then dropped."""
    try:
        stdout, watch = sys.stdout.fileno(), select.poll()
    except (OSError, AttributeError):  # no file, or a system without poll
        return False
    watch.register(stdout, 0)  # it tells of the other end, whatever is asked
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # Python flushes it once more when it ends, and would complain
    return True


def complain(what: str, text: object) -> None:
    """One line on stderr, with the number of the process when torchrun started several."""
    rank = os.environ.get("RANK")
    process = f" (process {rank})" if rank and os.environ.get("WORLD_SIZE", "1") not in ("", "1") else ""
    line = " ".join(part.strip() for part in str(text).splitlines())
    with suppress(OSError):  # nobody reads it
        print(printable(f"mapet: {what}{process}: {line}"), file=sys.stderr, flush=True)


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
