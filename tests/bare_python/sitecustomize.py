"""With this folder on PYTHONPATH, Python finds torch, triton, numpy and what these need, and no other package."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Any

PRESENT = ("torch", "triton", "numpy")
OURS = {"mapet", "mapet_kernels", "bench"}


def canonical(name: str) -> str:
    """A distribution's name as an index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_needs() -> set[str]:
    """PRESENT and, without extras, all that they need, as far as it is installed."""
    found, waiting = set(), list(PRESENT)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


class Without:
    """A finder that does not find some modules."""

    def __init__(self, finder: Any, missing: set[str]) -> None:
        self.finder, self.missing = finder, missing

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.missing else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


there = with_needs()
owners = importlib.metadata.packages_distributions()
absent = {module for module, names in owners.items() if not there & {canonical(name) for name in names}} - OURS
sys.meta_path[:] = [Without(finder, absent) for finder in sys.meta_path]
