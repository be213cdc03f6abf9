"""The process of one part: python -m bench.harvesting.child TASK, where TASK is the JSON that `harvest.Process` writes.

It imports what the part needs, waits for a line on its standard input, which gives the seconds it has, and runs the
part. So the imports of the next part, which take seconds, pass while the one before it runs.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from bench.harvesting.part import FAILED, OK, OUT_OF_MEMORY, SKIPPED, TIMED_OUT, Run, Skipped, end_file, ready_file

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
LARGEST_FILE = 2 << 30
"""Bytes of a file that a part may write: one that prints without end must not fill the disk."""


def main(task: dict[str, Any]) -> int:
    """Run the part that `task` describes, and say how it ended, whole or not at all."""
    faulthandler.enable()
    if sys.platform == "linux":  # ends this process when the harvest is killed, as nobody else would keep its limits
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = LARGEST_FILE if hard == resource.RLIM_INFINITY else min(LARGEST_FILE, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    folder = Path(task["folder"])
    status, reason, trace = ending(task, folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what happened is settled, and is written whole
    path = end_file(folder, task["name"])
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({"status": status, "reason": reason, "traceback": trace}))
    draft.replace(path)
    return 0 if status in (OK, SKIPPED) else 1


def ending(task: dict[str, Any], folder: Path) -> tuple[str, str | None, str | None]:
    """Status, reason and whole traceback. Whatever the part raises is a result here, so that everything is caught."""
    try:
        run(task, folder)
    except Skipped as reason:
        return SKIPPED, str(reason), None
    except KeyboardInterrupt as error:
        return TIMED_OUT, "interrupted at its limit", "".join(traceback.format_exception(error))
    except BaseException as error:
        # torch's OutOfMemoryError by its name: this process may never have imported torch.
        memory = isinstance(error, MemoryError) or "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}
        reason = f"{type(error).__name__}: {error}"[:300]
        return OUT_OF_MEMORY if memory else FAILED, reason, "".join(traceback.format_exception(error))
    return OK, None, None


def run(task: dict[str, Any], folder: Path) -> None:
    """Import, wait for the start, call."""
    function, failure = None, None
    try:
        module, name = task["call"].split(":")
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        failure = error
    ready_file(folder, task["name"]).touch()
    line = sys.stdin.readline()
    if not line:
        raise Skipped("the harvest ended before this part's turn")
    if failure is not None:
        raise failure
    seconds, limit = map(float, line.split())
    # Where it hangs, in the log, even where no signal is heard.
    faulthandler.dump_traceback_later(max(0.1, 0.5 * (seconds + limit)), exit=False)
    function(Run(task["name"], folder, seconds, task["dry"], task["arguments"]))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # tearing down a context that is poisoned can hang
