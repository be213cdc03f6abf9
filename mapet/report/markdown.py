"""Markdown that the reports have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mapet.words import in_line


def document(*sections: Sequence[str]) -> str:
    """A text of sections, which are lines; empty ones are left out."""
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(in_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def plain(name: str) -> str:
    """A name that is shown as it is: HTML, links and emphasis in it do nothing."""
    return re.sub(r"([\\`*<>\[\]])", r"\\\1", in_line(name))
