"""Who may import whom: no circle, nothing upward, and no torch where a command is only parsed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import mapet

PACKAGE = Path(mapet.__file__).parent
LAYERS = (
    {"errors", "words", "units", "checked", "rng", "files"},
)


def modules() -> dict[str, Path]:
    """Every module of mapet by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of mapet that a file imports, within functions too; not those for type annotations alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "mapet":
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in known else node.module


def test_no_circle_of_imports():
    known = modules()
    graph = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(known)
