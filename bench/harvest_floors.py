"""What an attention kernel with its tiles costs at least on an H200, for what a harvest measured.

From records of `python -m bench aot`, or compiled now where no record holds that configuration and shape.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harvest_data import Config, Shape

KERNELS = {"forward": "forward_kernel", "dq": "query_gradient_kernel", "dkdv": "key_gradient_kernel"}
"""Op -> kernel."""
TABLE = {"forward": "attention_forward", "dq": "attention_query_gradient", "dkdv": "attention_key_gradient"}
"""Op -> function of kernels/launch.py."""
UNITS = ("tensor cores", "exp2", "issue slots", "L2", "HBM")
GPU = "H200"
ROOT = Path(__file__).parent.parent
SOURCES = ("kernels/two_stream_attention", "kernels/attention_tiles.py")
"""Of the kernels; their launch table is not among them, as floors are by configuration."""


@dataclass(frozen=True)
class Floors:
    """Microseconds by unit; the binding one is the largest. source: the record, or what compiled it."""

    by_unit: Mapping[str, float]
    source: str

    @property
    def binding(self) -> str:
        return max(self.by_unit, key=self.by_unit.__getitem__)

    @property
    def largest(self) -> float:
        return self.by_unit[self.binding]


Key = tuple[str, Config, Shape, str]
"""(op, configuration, shape, dtype)."""
Find = Callable[[str, Config, Shape, str], Floors | None]


def finder(results: Path, device: str, triton: str | None, commit: str = "") -> Find:
    """Floors for a device: of the records in a folder, or compiled now where none has a configuration and shape.

    The rates are those of an H200, so another device has none. Floors of other kernels than those of the harvest's
    commit are left out; where git cannot say, that is told.
    """
    known = recorded(results, triton, commit) if GPU in device else {}
    same = same_kernels(commit)
    unable = GPU not in device or same is False

    def find(op: str, config: Config, shape: Shape, dtype: str) -> Floors | None:
        nonlocal unable
        key = (op, config, shape, dtype)
        if key not in known and not unable:
            try:
                known[key] = compiled(*key, told(same))
            except ImportError:  # no torch or Triton here
                unable = True
            except Exception as error:  # whatever a compiler raises: the page goes on without these floors
                print(f"no floors of {op}, {config}, {shape}: {type(error).__name__}: {error}")
                known[key] = None
        return known.get(key)

    return find


COMMIT = re.compile(r"[0-9a-f]{7,64}")
"""What comes back from elsewhere is text, and git would take some for an option."""


def same_kernels(commit: str, other: str | None = None) -> bool | None:
    """Whether two commits, or one and this checkout, have the same attention kernels; None where git cannot say."""
    if not all(COMMIT.fullmatch(name) for name in (commit, *([other] if other is not None else []))):
        return None
    try:
        command = ["git", "diff", "--quiet", commit, *([other] if other else []), "--", *SOURCES]
        code = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode
    except OSError:
        return None
    return {0: True, 1: False}.get(code)


def told(same: bool | None) -> str:
    """What is said of floors of kernels that may be others."""
    return "" if same else " (its kernels may be others than the harvest's)"


def recorded(results: Path, triton: str | None, commit: str) -> dict[Key, Floors | None]:
    """Floors of all records that are not of other kernels. Those surely of the same kernels win, then those of the same
    Triton, then the newest."""
    found: list[tuple[tuple[bool, bool, str], dict[Key, Floors | None]]] = []
    for path in sorted(results.glob("aot_*.json")):
        try:
            record = json.loads(path.read_text())
            if record.get("gpu", {}).get("name") != GPU:
                continue
            same = same_kernels(commit, record["commit"])
            if same is not False:
                order = bool(same), record["triton"] == triton, str(record["time"])
                found.append((order, floors_of(record, f"`{path.name}`{told(same)}")))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a record of another form has no floors
    return {key: floors for _, part in sorted(found, key=lambda item: item[0]) for key, floors in part.items()}


def floors_of(record: Mapping[str, Any], source: str) -> dict[Key, Floors | None]:
    """Floors of the plain two-stream kernels of one record."""
    found: dict[Key, Floors | None] = {}
    ops = {kernel: op for op, kernel in KERNELS.items()}
    for kernel in record["kernels"]:
        case, code = record["shapes"][kernel["shape"]], kernel["compiled"]
        if case.get("variant") == "plain" and kernel["floors"] and code["kernel"] in ops:
            shape = Shape(*(case[field] for field in Shape._fields))
            config = Config(*(code[field] for field in Config._fields))
            found[ops[code["kernel"]], config, shape, case["dtype"]] = Floors(kernel["floors"], source)
    return found


def compiled(op: str, config: Config, shape: Shape, dtype: str, doubt: str = "") -> Floors | None:
    """Compile the kernel with this configuration and work out its floors; None where its loops are not understood.

    Raises:
        ImportError: torch or Triton is missing.
    """
    from unittest.mock import patch

    import triton

    from bench import aot
    from bench.aot_cases import Attention
    from mapet_kernels import launch

    case = Attention(**shape._asdict(), dtype=dtype)
    with patch.object(launch, TABLE[op], lambda *_: launch.LaunchConfig(**config._asdict())):
        part = next(x for x in case.launches(launch.TARGETS[90]) if x.kernel.__name__ == KERNELS[op])
    cost = aot.cost_of("measured", case, part, launch.TARGETS[90])
    source = f"triton {triton.__version__}, compiled for this page{doubt}"
    return Floors(cost.floors, source) if cost.floors else None
