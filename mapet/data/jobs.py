"""The journal of a long job that is done part by part: which parts are finished, with the hashes of their files.

    plan.json        what the job is; the same command finds it again
    part_00007.json  written when the files of part 7 are safely on disk, last and whole or not at all
    .mapet.lock      held by the main process while it runs; a killed process holds nothing (mapet/folders.py)

A process that dies at any moment leaves its finished parts, and files without a record, which are made again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mapet.checked import conform
from mapet.errors import DataError
from mapet.files import FileRecord, UnreadableFile, read_record, sync_folder, write_whole
from mapet.folders import FolderLock, claim, clear

PLAN = "plan.json"


@dataclass(frozen=True)
class Part:
    """A finished part: its files, by path relative to the folder, and what else there is to remember."""

    files: dict[str, FileRecord]
    facts: Any


class Journal:
    """The journal in `folder` of the job that `plan` describes; any process of the job may read it and add parts.

    Args:
        folder: holds the journal and, below it, the files of the parts.
        plan: all that decides what the parts hold, as JSON values.
        what, place: what the job makes, in words, and where; by default in the folder.
        names: patterns of what else the job puts into the folder.
        parts: how many there are.
        files: the files of a part, by path relative to the folder.
        facts: a dataclass, what else there is to remember of a part.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Any],
        what: str,
        names: Sequence[str],
        place: Path | None = None,
        *,
        parts: int,
        files: Callable[[int], Sequence[str]],
        facts: type,
    ) -> None:
        self.folder, self.plan, self.what, self.place = folder, json.loads(json.dumps(plan)), what, place
        self.names = (PLAN, "part_*.json", *names)
        self._count, self._files_of, self._facts = parts, files, facts
        self._lock: FolderLock | None = None

    def begin(self, *, restart: bool = False) -> list[str]:
        """Take the lock, and write the plan where there is none; for the main process.

        Args:
            restart: delete what is left of another job instead of refusing it.
        Returns:
            In what the job deleted was different; empty where none was.
        Raises:
            DataError: another process holds the lock, the folder is that of another job (the text names what differs),
                or it holds other things.
        """
        self._lock = claim(self.folder, self.what, self.names, self.place)
        try:
            found = self.read_plan()
            differences = self.differences(found or {})
            if found is not None and differences and not restart:
                raise DataError(
                    f"{self.folder} holds work of another kind ({'; '.join(differences)}); finish it with the command "
                    "that began it, or delete that folder"
                )
            if differences:
                clear(self.folder)
                write_whole(self.folder / PLAN, json.dumps(self.plan, indent=1))
        except BaseException:
            self.end()
            raise
        return differences if found is not None else []

    @property
    def locked(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock is not None

    def end(self, *, remove: bool = False) -> None:
        """Give the lock back, if this process holds it; `remove` all that is in the folder first."""
        if self._lock is not None:
            if remove:
                with suppress(OSError):
                    clear(self.folder)
            self._lock.release()
            self._lock = None

    def read_plan(self) -> dict[str, Any] | None:
        """The plan in the folder; None where there is none that can be read."""
        try:
            return read_record(self.folder / PLAN, dict[str, Any])
        except UnreadableFile:
            return None

    def differences(self, found: dict[str, Any]) -> list[str]:
        """In what a plan differs from this one, in words."""
        names = [name for name in {**self.plan, **found} if self.plan.get(name) != found.get(name)]
        return [f"{name} is {found.get(name)}, wanted {self.plan.get(name)}" for name in names]

    def parts(self) -> dict[int, Part]:
        """The finished parts by number, ascending; files are not looked at."""
        try:
            names = os.listdir(self.folder)
        except OSError:  # not there yet, or not to be read, which `begin` reports
            return {}
        numbers = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"part_(\d+)\.json", name)))
        parts = {number: self._read_part(number) for number in numbers if number < self._count}
        return {number: part for number, part in parts.items() if part is not None}

    def damage(self, part: Part) -> str | None:
        """What is wrong with the files of a part, size and SHA-256; None where nothing is."""
        for name, record in part.files.items():
            try:
                found = FileRecord.of(self.folder / name, record)
            except UnreadableFile as error:
                return f"{name} cannot be read: {error.reason}"
            if found != record:
                return f"{name} is not as it was written"
        return None

    def finish(self, number: int, files: dict[str, FileRecord], facts: Any) -> None:
        """Record a part whose files are on disk."""
        for name in files:
            sync_folder((self.folder / name).parent)
        write_whole(self.folder / _record_name(number), json.dumps(asdict(Part(files, facts)), indent=1))

    def _read_part(self, number: int) -> Part | None:
        try:
            part = read_record(self.folder / _record_name(number), Part)
            facts = conform(self._facts, part.facts, "facts")
        except (UnreadableFile, ValueError):
            return None  # damaged: the part is made again
        return Part(part.files, facts) if set(part.files) == set(self._files_of(number)) else None

    def forget(self, number: int) -> None:
        """Drop the record of a part."""
        (self.folder / _record_name(number)).unlink(missing_ok=True)


def _record_name(number: int) -> str:
    return f"part_{number:05d}.json"
