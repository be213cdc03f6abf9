"""A pytest plugin, `-p absent_packages`: the packages of a bare GPU machine, all others cannot be found.

There are those named in PRESENT and what these need themselves, the standard library and this project. timm is there
without the packages it needs, which is the worst that such a machine may have.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from typing import Any

PRESENT = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis")
ALONE = ("timm", "setuptools")
OURS = ("mapet", "mapet_kernels", "bench")


def canonical(name: str) -> str:
    """A distribution's name as an index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_needs(names: Iterable[str]) -> set[str]:
    """The distributions and, without extras, all that they need, as far as they are installed."""
    found, waiting = set(), [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [canonical(re.match(r"[\w.-]+", need)[0]) for need in needs if "extra ==" not in need]
    return found


def absent(present: Iterable[str] = PRESENT, alone: Iterable[str] = ALONE) -> set[str]:
    """Top-level modules that are installed here and not there: neither `present`, with needs, nor `alone`, without."""
    there = with_needs(present) | {canonical(name) for name in alone}
    owners = importlib.metadata.packages_distributions()
    missing = {module for module, names in owners.items() if not there & {canonical(name) for name in names}}
    return missing - set(OURS)


class Without:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, missing: set[str]) -> None:
        self.finder, self.missing = finder, missing

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.missing else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide(missing: set[str]) -> None:
    """From now on none of these modules can be imported."""
    sys.meta_path[:] = [Without(finder, missing) for finder in sys.meta_path]


def pytest_configure() -> None:
    """Where this is a plugin."""
    hide(absent())
