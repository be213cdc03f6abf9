"""Who may import whom: no circle, and nothing upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mapet

PACKAGE = Path(mapet.__file__).parent


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


def layer(name: str) -> str:
    """The part of mapet that a module belongs to."""
    return name.split(".")[1] if "." in name else ""


def test_no_circle_of_imports():
    known = modules()
    graph = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(known)


@pytest.mark.parametrize(
    ("lower", "uppers"),
    [
        ("data", {"tokenizers", "objectives", "training", "commands"}),
        ("objectives", {"training", "tokenizers", "commands"}),
        ("model", {"objectives", "training", "tokenizers", "commands"}),
        ("tokenizers", {"training", "commands", "report"}),
        ("training", {"commands", "report", "demo", "evaluate"}),
        ("planning", {"commands"}),
        ("report", {"commands", "demo"}),
        ("evaluate", {"commands", "report", "demo"}),
    ],
)
def test_nothing_is_imported_from_above(lower: str, uppers: set[str]):
    known = modules()
    above = {
        f"{name} imports {used}"
        for name, path in known.items()
        if layer(name) == lower
        for used in imports(path, known)
        if layer(used) in uppers
    }
    assert above == set()
