"""What can be shown without a Windows machine: no module that only POSIX has is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT = """
import sys
from pathlib import Path
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
import os, pkgutil, signal
del signal.SIGHUP, os.geteuid, os.O_NONBLOCK
import mapet
for module in pkgutil.walk_packages(mapet.__path__, "mapet."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
from mapet.files import write_whole
from mapet.folders import BusyFolder, Staging, locked
folder = Path(sys.argv[1])
write_whole(folder / "file", "whole")
with locked(folder / "locked", "run"):
    try:
        with locked(folder / "locked", "run"):
            raise SystemExit("locked twice")
    except BusyFolder:
        pass
staging = Staging(folder / "made", "exported model", lambda found: ("a",))
for text in ("first", "second"):
    with staging.making() as new:
        write_whole(new / "a", text)
        staging.move(new)
"""


def test_everything_is_imported_and_written_without_posix_modules(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {
        "file": "whole",
        "made/a": "second",
    }
