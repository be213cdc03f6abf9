"""What an attention kernel costs at least on an H200, for what a harvest measured.

From records of `python -m bench aot`, or compiled now where no record holds that configuration and shape.
"""

from __future__ import annotations

import json
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


def finder(results: Path, device: str, triton: str | None) -> Find:
    """Floors for a device: of the records in a folder, of this Triton where there are several, else compiled now.

    The rates are those of an H200, so another device has none.
    """
    known = recorded(results, triton) if GPU in device else {}
    broken: list[str] = []

    def find(op: str, config: Config, shape: Shape, dtype: str) -> Floors | None:
        key = (op, config, shape, dtype)
        if key not in known and GPU in device and not broken:
            try:
                known[key] = compiled(*key)
            except ImportError as error:  # no torch or Triton here
                broken.append(str(error))
            except Exception as error:  # whatever a compiler raises: the page goes on without these floors
                print(f"no floors of {op}, {config}, {shape}: {type(error).__name__}: {error}")
                known[key] = None
        return known.get(key)

    return find


def recorded(results: Path, triton: str | None) -> dict[Key, Floors | None]:
    """Floors of all kernels in the records; the newest of the same Triton wins, then the newest."""
    found: list[tuple[bool, str, dict[Key, Floors | None]]] = []
    for path in sorted(results.glob("aot_*.json")):
        try:
            record = json.loads(path.read_text())
            if record.get("gpu", {}).get("name") == GPU:
                found.append((record["triton"] == triton, record["time"], floors_of(record, path.name)))
        except (ValueError, KeyError, TypeError):
            continue  # a record of another form has no floors
    return {key: floors for _, _, part in sorted(found, key=lambda item: item[:2]) for key, floors in part.items()}


def floors_of(record: Mapping[str, Any], name: str) -> dict[Key, Floors | None]:
    """Floors of the plain two-stream kernels of one record."""
    found: dict[Key, Floors | None] = {}
    ops = {kernel: op for op, kernel in KERNELS.items()}
    for kernel in record["kernels"]:
        case, code = record["shapes"][kernel["shape"]], kernel["compiled"]
        if case.get("variant") == "plain" and kernel["floors"] and code["kernel"] in ops:
            shape = Shape(*(case[field] for field in Shape._fields))
            config = Config(*(code[field] for field in Config._fields))
            found[ops[code["kernel"]], config, shape, case["dtype"]] = Floors(kernel["floors"], f"`{name}`")
    return found


def compiled(op: str, config: Config, shape: Shape, dtype: str) -> Floors | None:
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
    return Floors(cost.floors, f"triton {triton.__version__}, compiled for this page") if cost.floors else None
