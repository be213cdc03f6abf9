"""The examples of the READMEs run, and what they point at exists."""

from __future__ import annotations

import re
import shlex
from itertools import chain
from pathlib import Path

import pytest

from mapet.commands.options import COMMANDS, EXAMPLES
from mapet.commands.parsing import parse

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


COMMAND = re.compile(r"(?:^|[ `\"])mapet (tokenize|pretrain|plan|probe|codebook|export|demo|doctor)\b([^`\n#\"]*)")
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "Makefile",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("mapet/**/*.py"),
]


def test_every_command_line_has_options_that_exist(mapet) -> None:
    """In all texts and sources; those that stand alone are parsed."""
    helps = {name: mapet.succeed(name, "--help").out.replace(",", " ") + " --help --masked " for name in COMMANDS}
    seen = 0
    for path in TEXTS:
        for name, rest in COMMAND.findall(re.sub(r"\\\\?\n *", "", path.read_text())):
            words = rest.replace("...", "").split()
            options = [word.partition("=")[0].strip(".,;:)'") for word in words if re.match("--[a-z]", word)]
            assert not [option for option in options if f"{option} " not in helps[name]], (path, name, rest)
            seen += len(options)
    assert seen > 60


@pytest.mark.parametrize(
    "line", [*re.findall(r"^    (mapet [^#\n]+)", README, flags=re.MULTILINE), *chain(*EXAMPLES.values())]
)
def test_a_command_line_that_stands_alone_can_be_parsed(line) -> None:
    name, *arguments = shlex.split(line)[1:]
    assert parse([name, *arguments])[0] == name
