"""The report on a codebook: how its entries are used, what they look like, and which of them belong to which class.

Everything is counted over all tokens of a token cache. The folder:

    report.md          the numbers and the pictures; its first line says whose it is
    usage.png          sorted usage
    most_used.png, least_used.png, chosen.png, classes.png   patches of entries
    usage.csv          entry, tokens, share, the earlier entry that it repeats
    classes.csv        class, its entries by pointwise mutual information, tokens
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from mapet.checked import check
from mapet.config import Count, Rows
from mapet.data.cache import TokenCache
from mapet.demo.report import Picture
from mapet.errors import ConfigError, DataError
from mapet.files import UnreadableFile, read_bytes, write_whole
from mapet.folders import LOCK, PARTIAL_FILES, check_place, locked
from mapet.report.codebook_pictures import draw_usage
from mapet.report.gallery import GalleryRow, draw_gallery, most_used, share_text
from mapet.report.markdown import plain, table
from mapet.tokenizers.usage import (
    CodebookUsage,
    class_counts,
    count_usage,
    pointwise_mutual_information,
    repeated_entries,
)
from mapet.words import in_line

KIND = "codebook report"
REPORT, USAGE, CLASSES = "report.md", "usage.csv", "classes.csv"
MARK = "<!-- Written by mapet codebook, which will replace this file, and the pictures and tables beside it. -->"
SHOWN_CLASSES = 100
"""Classes in the table of report.md, at most; classes.csv has them all."""
SHOWN_IDS = 40
"""Ids of dead and repeated entries that report.md lists, at most; usage.csv has them all."""
CLASS_ENTRIES = 5
"""Entries of a class in the table of report.md."""
SAVED_CLASS_ENTRIES = 20
"""And in classes.csv."""
COLUMNS = 8


@dataclass(frozen=True)
class ClassTie:
    """An entry that is tied to a class.

    Attributes:
        information: pointwise mutual information in bits.
        tokens: of the entry, in images of the class.
        part: of all the entry's tokens, that are in images of the class.
    """

    entry: int
    information: float
    tokens: int
    part: float


class CodebookStatistics:
    """Counts over the tokens of a cache.

    Args:
        codebook: (K, F), where it is known; without it repeated entries are not.
        floor: least tokens that an entry has in a class to be tied to it.
    Attributes:
        tokens: (n, P), uint16, memory-mapped.
        usage: CodebookUsage.
        repeats: entries that equal an earlier one, and that one; None where the codebook is not known.
    """

    def __init__(self, cache: TokenCache, codebook: Tensor | None = None, *, floor: int = 20) -> None:
        check(Count, floor, "floor")
        self.cache, self.floor = cache, floor
        self.tokens = cache.token_array
        self.repeats = None if codebook is None else repeated_entries(codebook)
        self.usage = CodebookUsage(count_usage(cache).counts, repeated=len(self.repeats or ()))

    @cached_property
    def by_class(self) -> np.ndarray:
        """(classes, K) int64, tokens of every entry in the images of every class."""
        return class_counts(self.tokens, self.cache.labels, self.cache.vocabulary, len(self.cache.classes))

    @cached_property
    def information(self) -> np.ndarray:
        """(classes, K) pointwise mutual information in bits."""
        return pointwise_mutual_information(self.by_class, self.floor)

    def ties(self, number: int, count: int) -> list[ClassTie]:
        """Entries most tied to a class, at most `count`, those above chance only; of equal ties the more frequent."""
        information = self.information[number]
        best = np.lexsort((-self.by_class[number], -information))[:count]
        return [
            ClassTie(
                entry=int(entry),
                information=float(information[entry]),
                tokens=int(self.by_class[number, entry]),
                part=float(self.by_class[number, entry] / self.usage.counts[entry]),
            )
            for entry in best
            if information[entry] > 0
        ]

    def places(self, entry: int, number: int | None = None) -> np.ndarray:
        """(m, 2) image and patch of the entry's tokens, in the images of one class if it is given."""
        places = np.argwhere(self.tokens == entry)
        return places if number is None else places[self.cache.labels[places[:, 0]] == number]


def write_codebook_report(
    cache: TokenCache,
    output: str | Path,
    *,
    codebook: Tensor | None = None,
    chosen: Sequence[int] = (),
    rows: int = 10,
    floor: int = 20,
    seed: int = 0,
    command: str = "",
) -> Path:
    """Write the report of a cache's codebook into a folder; the path of report.md is returned.

    Args:
        codebook: (K, F), for repeated entries.
        chosen: entries to draw as well.
        rows: entries of a picture.
        floor: as in CodebookStatistics.
        seed: picks the patches drawn.
    Raises:
        ConfigError: a chosen entry outside the codebook, rows or floor below 1, or a folder inside another output.
        DataError: files cannot be written, others have their names, or another process is at work there.
    """
    check(Rows, rows, "rows")
    if outside := [entry for entry in chosen if not 0 <= entry < cache.vocabulary]:
        raise ConfigError(f"entries {', '.join(map(str, outside))}: the codebook has 0 to {cache.vocabulary - 1}")
    output, found = Path(output), CodebookStatistics(cache, codebook, floor=floor)
    check_place(output, KIND)
    check_ours(output)
    try:
        with locked(output, KIND):
            check_ours(output)
            if not (output / REPORT).exists():  # the mark comes before what it is for
                write_whole(output / REPORT, f"{MARK}\n\nThis report is not done.\n")
            pictures = list(_pictures(found, output, chosen, rows, seed))
            write_whole(output / USAGE, _usage_csv(found))
            if cache.labels is not None:
                write_whole(output / CLASSES, _classes_csv(found))
            write_whole(output / REPORT, f"{MARK}\n\n{render(found, pictures, chosen, command)}")
    except OSError as error:
        raise DataError(f"could not write the codebook report {output}: {error.strerror or error}") from error
    return output / REPORT


def check_ours(output: Path) -> None:
    """DataError, naming one, where the folder holds files of others and no report of ours."""
    with suppress(UnreadableFile):
        if read_bytes(output / REPORT).startswith(MARK.encode()):
            return
    for name in sorted(os.listdir(output)) if output.is_dir() else ():
        if name != LOCK and not fnmatch(name, PARTIAL_FILES):
            raise DataError(f"{output / name} was not written by mapet codebook, so it stays: name another folder")


def render(found: CodebookStatistics, pictures: Sequence[Picture], chosen: Sequence[int], command: str) -> str:
    """The report as Markdown, beside its pictures."""
    shown = {
        picture.path.stem: [f"![{picture.path.stem}]({picture.path.name})", "", picture.caption] for picture in pictures
    }
    sections = [
        [f"# Codebook of {plain(found.cache.path.name)}", *(["", f"Made by `{in_line(command)}`."] if command else [])],
        ["## Usage", "", *table(("", ""), _facts(found)), "", *shown["usage"]],
        ["## Entries", "", *shown["most_used"]],
        shown["least_used"],
        *([shown["chosen"]] if "chosen" in shown else []),
        *([_unused_sentence(found, chosen)] if _unused(found, chosen) else []),
        ["## Entries and classes", "", *_class_section(found)],
        *([shown["classes"]] if "classes" in shown else []),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _facts(found: CodebookStatistics) -> list[tuple[str, str]]:
    usage, cache = found.usage, found.cache
    dead = len(usage.dead)
    if found.repeats is None:
        repeats = "not known: the codebook was not given"
    else:
        repeats = f"{len(found.repeats):,}" + _some(f"{entry} (as {first})" for entry, first in found.repeats.items())
    return [
        ("tokenizer", plain(cache.tokenizer)),
        ("images", f"{len(cache):,}, of {cache.grid} x {cache.grid} tokens"),
        ("entries", f"{usage.vocabulary:,}, of which {usage.vocabulary - dead:,} are used"),
        ("perplexity", f"{usage.perplexity:,.1f} ({usage.perplexity / usage.vocabulary:.0%} of the entries)"),
        ("entropy", f"{np.log2(usage.perplexity):.2f} of at most {np.log2(usage.vocabulary):.2f} bits a token"),
        ("most used entry", f"{int(usage.counts.argmax())}, {usage.largest_share:.2%} of all tokens"),
        ("dead entries, never used", f"{dead:,}" + _some(map(str, usage.dead))),
        ("entries that repeat an earlier one", repeats),
        ("collapsed", "; ".join(usage.collapse()) or "no"),
    ]


def _class_section(found: CodebookStatistics) -> list[str]:
    cache = found.cache
    if cache.labels is None:
        return [
            "The images have no labels: put them into one sub-folder per class to see which entries belong to which."
        ]
    rows = []
    for number, name in enumerate(cache.classes[:SHOWN_CLASSES]):
        ties = found.ties(number, CLASS_ENTRIES)
        cells = [f"{tie.entry}: {tie.information:.2f} bits, {tie.tokens:,} tokens ({tie.part:.0%})" for tie in ties]
        rows.append((plain(name), *(cells + [""] * (CLASS_ENTRIES - len(cells)))))
    left_out = len(cache.classes) - len(rows)
    more = f" The other {left_out} classes are in classes.csv." if left_out else ""
    return [
        "Pointwise mutual information of entry e and class c, from the n(e, c) tokens that are e in images of c:",
        "",
        "    PMI(e, c) = log2( n(e, c) N / (n(e) n(c)) )",
        "",
        "0 bits is what chance gives; with 1 bit the entry is twice as frequent in the class as in all images. Rare"
        f" entries score high by chance, so only those with n(e, c) >= {found.floor} count. In brackets: the part of"
        f" the entry's tokens that is in the class.{more}",
        "",
        *table(("class", *(f"entry {i + 1}" for i in range(CLASS_ENTRIES))), rows),
    ]


def _unused(found: CodebookStatistics, chosen: Sequence[int]) -> list[int]:
    return [entry for entry in chosen if not found.usage.counts[entry]]


def _unused_sentence(found: CodebookStatistics, chosen: Sequence[int]) -> list[str]:
    return [f"Chosen, but never used: {', '.join(map(str, _unused(found, chosen)))}."]


def _some(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = f" and {len(texts) - SHOWN_IDS:,} more, in usage.csv" if len(texts) > SHOWN_IDS else ""
    return f": {', '.join(texts[:SHOWN_IDS])}{more}" if texts else ""


def _pictures(
    found: CodebookStatistics, output: Path, chosen: Sequence[int], rows: int, seed: int
) -> Iterable[Picture]:
    counts = found.usage.counts
    yield Picture(
        draw_usage(output / "usage.png", found.usage),
        "Left: tokens of each entry, sorted, on a logarithmic scale; the dashed line is even use. Right: how many"
        " entries cover how much of all tokens; even use is the dashed diagonal.",
    )
    used = most_used(counts, found.usage.vocabulary)
    kinds = [
        ("most_used", used[:rows], "Most used entries"),
        ("least_used", used[-rows:][::-1], "Least used entries that occur at all"),
        ("chosen", [entry for entry in chosen if counts[entry]], "Chosen entries"),
    ]
    for name, entries, title in kinds:
        if entries:
            path = output / f"{name}.png"
            labelled = [
                GalleryRow(f"entry {entry}", share_text(counts[entry], found.usage.total), found.places(entry))
                for entry in entries
            ]
            _draw(found, path, labelled, title, f"{len(entries)} of the {len(used):,} entries in use", seed)
            yield Picture(
                path, f"{title}: the average patch, then patches that have this token, in their surroundings."
            )
    if found.cache.labels is not None and (labelled := _class_rows(found, rows)):
        path = output / "classes.png"
        subtitle = "the entry of the highest pointwise mutual information with the class, patches from its images"
        _draw(found, path, labelled, "Entries most tied to a class", subtitle, seed)
        yield Picture(
            path,
            "For each class the entry most tied to it, with patches from images of that class only."
            + (
                f" Shown are the {len(labelled)} classes with the strongest ties."
                if len(labelled) < len(found.cache.classes)
                else ""
            ),
        )


def _class_rows(found: CodebookStatistics, rows: int) -> list[GalleryRow]:
    """The strongest tie of each class; of more classes than rows, those with the strongest."""
    best = [(ties[0], number) for number in range(len(found.cache.classes)) if (ties := found.ties(number, 1))]
    shown = sorted(best, key=lambda pair: -pair[0].information)[:rows]
    return [
        GalleryRow(
            _short(found.cache.classes[number]),
            f"entry {tie.entry}, {tie.information:.1f} bits",
            found.places(tie.entry, number),
        )
        for tie, number in sorted(shown, key=lambda pair: pair[1])
    ]


def _draw(
    found: CodebookStatistics, path: Path, rows: Sequence[GalleryRow], title: str, subtitle: str, seed: int
) -> None:
    images, columns = _CacheImages(found.cache), min(COLUMNS, max(4, *(len(row.places) for row in rows)))
    draw_gallery(path, images, rows, found.cache.grid, columns=columns, title=title, subtitle=subtitle, seed=seed)


@dataclass(frozen=True)
class _CacheImages:
    """The images of a cache, read one by one."""

    cache: TokenCache

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.cache), 3, self.cache.image_size, self.cache.image_size)

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Tensor:
        return self.cache.images([index])[0]


def _short(name: str, most: int = 14) -> str:
    name = in_line(name)
    return name if len(name) <= most else name[: most - 1] + "…"


def _usage_csv(found: CodebookStatistics) -> str:
    usage, repeats = found.usage, found.repeats or {}
    rows = (
        (entry, count, f"{count / usage.total:.8f}", repeats.get(entry, ""))
        for entry, count in enumerate(usage.counts.tolist())
    )
    return _csv(("entry", "tokens", "share", "repeats"), rows)


def _classes_csv(found: CodebookStatistics) -> str:
    rows = (
        (in_line(name), rank, tie.entry, f"{tie.information:.4f}", tie.tokens, f"{tie.part:.6f}")
        for number, name in enumerate(found.cache.classes)
        for rank, tie in enumerate(found.ties(number, SAVED_CLASS_ENTRIES), start=1)
    )
    return _csv(("class", "rank", "entry", "pmi_bits", "tokens", "part_of_entry"), rows)


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
