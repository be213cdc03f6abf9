"""The README's examples run, and what it points at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {})


def test_paths_exist() -> None:
    paths = re.findall(r"`((?:kernels|mapet|tests|bench)/[\w/.]*)`", README)
    assert len(paths) > 20
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_figures_have_a_record() -> None:
    """Every record the README names is there."""
    for record in re.findall(r"bench/results/[\w.]+\.json", README):
        assert (ROOT / record).exists(), record


def test_kernels_do_not_import_mapet() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(?:from|import) mapet(?:\.|\s)", path.read_text(), flags=re.MULTILINE), path
