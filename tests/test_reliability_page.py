"""docs/reliability.md names every assertion once, and tests that exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = re.findall(r"^\| (\d+) \|.*$", (page := (TESTS.parent / "docs/reliability.md").read_text()), re.MULTILINE)
NUMBERS = 38


def names_in(file: Path) -> set[str]:
    """Names as pytest has them, parameters aside."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_assertion_has_its_line():
    assert [int(number) for number in ROWS] == list(range(1, NUMBERS + 1))


def test_every_test_that_is_named_exists():
    for line in page.splitlines():
        if re.match(r"\| \d", line):
            names = re.findall(r"`(test_\w+\.py)::([\w:]+)`", line)
            assert names, line
            for file, name in names:
                assert name in names_in(TESTS / file), f"{file}::{name}"
                assert name.rpartition("::")[2].startswith("test_")
