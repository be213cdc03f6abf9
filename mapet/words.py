"""Text that is safe to print, whatever bytes a name in it has."""

from __future__ import annotations

import re
from typing import TextIO

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""All but tab and newline that a terminal may obey, marks that turn the direction of writing, and bytes of file names
that are no UTF-8."""


def printable(text: object) -> str:
    """The text with escape codes, other control characters and undecodable bytes written out, as in \\x1b."""
    return CONTROL.sub(lambda found: _written_out(found[0]), str(text))


def in_line(text: object) -> str:
    """As `printable`, with line ends and tabs written out too: for a name within a line or a table."""
    return re.sub("[\t\n\u2028\u2029]", lambda found: _written_out(found[0]), printable(text))


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print text at once, in a form that is safe whatever names are in it; on stdout unless told otherwise."""
    print(printable(text), file=file, flush=True)


def _written_out(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as Python keeps it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
