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
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mapet.checked import check
from mapet.config import Count, Rows
from mapet.data.build import count_usage
from mapet.data.cache import TokenCache
from mapet.errors import ConfigError, DataError
from mapet.files import UnreadableFile, read_bytes, write_whole
from mapet.folders import LOCK, PARTIAL_FILES, check_place, locked
from mapet.report.gallery import GalleryRow, draw_gallery, entry_rows
from mapet.report.markdown import document, plain, table
from mapet.report.picture import CONTEXT, FAINT, HIDDEN, INK, QUERY, Picture, frame, save
from mapet.tokenizers.usage import CodebookUsage, class_counts, pointwise_mutual_information, repeated_entries
from mapet.words import in_line

KIND = "codebook report"
REPORT, USAGE, CLASSES = "report.md", "usage.csv", "classes.csv"
MARK = "<!-- Written by mapet codebook, which will replace this file, and the pictures and tables beside it. -->"
SHOWN_CLASSES = 100
"""Classes in the table of report.md, at most; classes.csv has them all."""
SHOWN_IDS = 40
"""Ids of dead and repeated entries that report.md lists, at most; usage.csv has them all."""
CLASS_ENTRIES, SAVED_CLASS_ENTRIES = 5, 20
"""Entries of a class in the table of report.md, and in classes.csv."""
SHOWN_NAME = 14
"""Characters of a class name beside its patches, at most."""


class ClassTie(NamedTuple):
    """An entry that is tied to a class."""

    entry: int
    information: float
    """Pointwise mutual information in bits."""
    tokens: int
    """Of the entry, in images of the class."""
    part: float
    """Of all the entry's tokens, that are in images of the class."""


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
    def _by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """(classes, K) tokens of every entry in the images of every class, and their mutual information in bits."""
        counts = class_counts(self.tokens, self.cache.labels, self.cache.vocabulary, len(self.cache.classes))
        return counts, pointwise_mutual_information(counts, self.floor)

    def ties(self, number: int, count: int) -> list[ClassTie]:
        """Entries most tied to a class, at most `count`, those above chance only; of equal ties the more frequent."""
        tokens, information = (values[number] for values in self._by_class)
        best = [int(entry) for entry in np.lexsort((-tokens, -information))[:count] if information[entry] > 0]
        part = tokens / np.maximum(self.usage.counts, 1)
        return [ClassTie(entry, float(information[entry]), int(tokens[entry]), float(part[entry])) for entry in best]

    def places(self, entry: int, number: int) -> np.ndarray:
        """(m, 2) image and patch of the entry's tokens in the images of a class."""
        places = np.argwhere(self.tokens == entry)
        return places[self.cache.labels[places[:, 0]] == number]


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
            pictures = {picture.path.stem: picture for picture in _pictures(found, output, chosen, rows, seed)}
            write_whole(output / USAGE, _usage_csv(found))
            if cache.labels is not None:
                write_whole(output / CLASSES, _classes_csv(found))
            write_whole(output / REPORT, f"{MARK}\n\n{_render(found, pictures, output, chosen, command)}")
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


def _render(
    found: CodebookStatistics, pictures: dict[str, Picture], folder: Path, chosen: Sequence[int], command: str
) -> str:
    """The report as Markdown, beside its pictures."""
    shown = {name: picture.markdown(folder) for name, picture in pictures.items()}
    unused = ", ".join(str(entry) for entry in chosen if not found.usage.counts[entry])
    return document(
        [f"# Codebook of {plain(found.cache.path.name)}", *(["", f"Made by `{in_line(command)}`."] if command else [])],
        ["## Usage", "", *table(("", ""), _facts(found)), "", *shown["usage"]],
        ["## Entries", "", *shown["most_used"]],
        shown["least_used"],
        shown.get("chosen", []),
        [f"Chosen, but never used: {unused}."] if unused else [],
        ["## Entries and classes", "", *_class_section(found)],
        shown.get("classes", []),
    )


def _facts(found: CodebookStatistics) -> list[tuple[str, str]]:
    usage, cache = found.usage, found.cache
    used, repeats = usage.vocabulary - len(usage.dead), "not known: the codebook was not given"
    if found.repeats is not None:
        repeats = _listed([f"{entry} (as {first})" for entry, first in found.repeats.items()])
    return [
        ("tokenizer", plain(cache.tokenizer)),
        ("images", f"{len(cache):,}, of {cache.grid} x {cache.grid} tokens"),
        ("entries", f"{usage.vocabulary:,}, of which {used:,} are used"),
        ("perplexity", f"{usage.perplexity:,.1f} ({usage.perplexity / usage.vocabulary:.0%} of the entries)"),
        ("entropy", f"{np.log2(usage.perplexity):.2f} of at most {np.log2(usage.vocabulary):.2f} bits a token"),
        ("most used entry", f"{int(usage.counts.argmax())}, {usage.largest_share:.2%} of all tokens"),
        ("dead entries, never used", _listed(list(map(str, usage.dead)))),
        ("entries that repeat an earlier one", repeats),
        ("collapsed", "; ".join(usage.collapse()) or "no"),
    ]


def _listed(texts: list[str]) -> str:
    """Their number, and some of them."""
    more = f" and {len(texts) - SHOWN_IDS:,} more, in usage.csv" if len(texts) > SHOWN_IDS else ""
    return f"{len(texts):,}" + (f": {', '.join(texts[:SHOWN_IDS])}{more}" if texts else "")


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


def _pictures(
    found: CodebookStatistics, output: Path, chosen: Sequence[int], rows: int, seed: int
) -> Iterable[Picture]:
    counts, cache = found.usage.counts, found.cache
    yield Picture(
        draw_usage(output / "usage.png", found.usage),
        "Left: tokens of each entry, sorted, on a logarithmic scale; the dashed line is even use. Right: how many"
        " entries cover how much of all tokens; even use is the dashed diagonal.",
    )
    used = [int(entry) for entry in np.argsort(-counts, kind="stable") if counts[entry]]
    for name, entries, title in (
        ("most_used", used[:rows], "Most used entries"),
        ("least_used", used[-rows:][::-1], "Least used entries that occur at all"),
        ("chosen", [entry for entry in chosen if counts[entry]], "Chosen entries"),
    ):
        if entries:
            shown, subtitle = entry_rows(found.tokens, counts, entries), f"{len(entries)} of the {len(used):,} entries"
            path = output / f"{name}.png"
            draw_gallery(path, cache, shown, title=title, subtitle=f"{subtitle} in use", seed=seed)
            yield Picture(
                path, f"{title}: the average patch, then patches that have this token, in their surroundings."
            )
    if cache.labels is not None and (shown := _class_rows(found, rows)):
        subtitle = "the entry of the highest pointwise mutual information with the class, patches from its images"
        path, title = output / "classes.png", "Entries most tied to a class"
        few = f" Shown are the {len(shown)} classes with the strongest ties."
        yield Picture(
            draw_gallery(path, cache, shown, title=title, subtitle=subtitle, seed=seed),
            "For each class the entry most tied to it, with patches from images of that class only."
            + (few if len(shown) < len(cache.classes) else ""),
        )


def _class_rows(found: CodebookStatistics, rows: int) -> list[GalleryRow]:
    """The strongest tie of each class; of more classes than rows, those with the strongest."""
    best = [(tie, number) for number in range(len(found.cache.classes)) for tie in found.ties(number, 1)]
    shown = sorted(best, key=lambda pair: -pair[0].information)[:rows]
    named = []
    for tie, number in sorted(shown, key=lambda pair: pair[1]):
        name = in_line(found.cache.classes[number])
        name = name if len(name) <= SHOWN_NAME else f"{name[: SHOWN_NAME - 1]}…"
        detail = f"entry {tie.entry}, {tie.information:.1f} bits"
        named.append(GalleryRow(name, detail, found.places(tie.entry, number)))
    return named


def draw_usage(path: str | Path, usage: CodebookUsage) -> Path:
    """Draw the entries' counts, sorted, and how many entries cover how much of the tokens."""
    counts = np.sort(usage.counts)[::-1]
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_counts(left, usage, counts)
    _draw_cover(right, usage, counts)
    return save(figure, path)


def _draw_counts(axes: Axes, usage: CodebookUsage, counts: np.ndarray) -> None:
    used, even = np.count_nonzero(counts), usage.total / usage.vocabulary
    rank, bottom = np.arange(1, used + 1), max(0.5, counts[used - 1] / 3)
    axes.fill_between(rank, counts[:used], bottom, step="mid", color=CONTEXT, alpha=0.22, linewidth=0)
    axes.step(rank, counts[:used], where="mid", color=CONTEXT, linewidth=1.8)
    axes.axhline(even, color=INK, linewidth=1.1, linestyle="--")
    beside = {"textcoords": "offset points", "size": 9}
    place = {"xycoords": ("axes fraction", "data"), "xytext": (5, -12), "color": INK}
    axes.annotate(f"even use: {even:,.0f}", (0, even), **place, **beside)
    if used < usage.vocabulary:
        axes.axvspan(used + 0.5, usage.vocabulary + 0.5, color=HIDDEN)
        axes.axvline(used + 0.5, color=QUERY, linewidth=1.2)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (-5, 0), "color": QUERY, "ha": "right"}
        axes.annotate(f"{usage.vocabulary - used:,} never used", (used + 0.5, 0.94), **place, **beside)
    axes.set(yscale="log", ylim=(bottom, 2.2 * counts[0]), xlim=(0.5, usage.vocabulary + 0.5))
    frame(axes, "y", title="How often each entry is used", x="entries, the most used first", y="tokens (log scale)")


def _draw_cover(axes: Axes, usage: CodebookUsage, counts: np.ndarray) -> None:
    cover = np.concatenate([[0], np.cumsum(counts) / max(usage.total, 1)])
    axes.plot([0, usage.vocabulary], [0, 100], color=INK, linewidth=1.1, linestyle="--")
    axes.plot(np.arange(len(cover)), 100 * cover, color=CONTEXT, linewidth=1.8)
    half = int(np.searchsorted(cover, 0.5))
    axes.plot([half, half, 0], [0, 50, 50], color=FAINT, linewidth=1)
    axes.plot([half], [50], "o", color=CONTEXT, markersize=5)
    axes.text(0.98, 0.03, f"{half:,} entries make up half", transform=axes.transAxes, ha="right", size=9, color=INK)
    axes.set(xlim=(0, usage.vocabulary), ylim=(0, 101))
    title = f"Perplexity {usage.perplexity:,.1f} of {usage.vocabulary:,}"
    frame(axes, "y", title=title, x="entries", y="tokens covered (%)")


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
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()
