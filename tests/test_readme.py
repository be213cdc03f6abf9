"""The examples of the READMEs run, and what they point at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def examples(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", examples("README.md"), ids=lambda text: text.splitlines()[1])
def test_example_of_the_readme_runs(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {})


def test_examples_of_the_kernels_guide_run_one_after_another() -> None:
    blocks = examples("kernels/README.md")
    assert len(blocks) == 7
    exec(compile("\n".join(blocks), "kernels/README.md", "exec"), {})


def test_paths_exist() -> None:
    paths = re.findall(r"`((?:kernels|mapet|tests|bench)/[\w/.]*)`", README)
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_figures_have_a_record() -> None:
    for record in re.findall(r"bench/results/[\w.]+\.json", README):
        assert (ROOT / record).exists(), record


def test_kernels_do_not_import_mapet() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(?:from|import) mapet(?:\.|\s)", path.read_text(), flags=re.MULTILINE), path
