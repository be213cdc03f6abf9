"""A fit on disk while it runs: the sampled features and the state of the k-means, so that a killed run can go on.

<tokenizer>/fit/
    sample.npy    the rows the k-means is over
    sample.json   what they are, and the settings of the fit; written when sample.npy is whole
    kmeans        state of the k-means
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from mapet.checked import at_least
from mapet.errors import ConfigError, DataError
from mapet.files import NpyWriter, UnreadableFile, read_record, replacing, write_whole
from mapet.tokenizers.store import UNFINISHED
from mapet_kernels.kmeans import NpyRows

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Sample:
    """Rows (n, F) on the CPU, drawn from `patches` of `images`."""

    rows: Tensor
    images: int
    patches: int


@dataclass(frozen=True)
class Description:
    """sample.json."""

    images: Annotated[int, at_least(1)]
    patches: Annotated[int, at_least(1)]
    settings: dict[str, Any]


class UnfinishedFit:
    """The folder `fit` in a tokenizer's folder. `settings` are all that the result depends on.

    Raises:
        ConfigError: it holds a fit of other settings, which are listed; with `overwrite` that one is removed instead.
    """

    def __init__(self, tokenizer_folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self.folder, self.settings = tokenizer_folder / UNFINISHED, settings
        self.kmeans = self.folder / "kmeans"
        self._rows, self._description = self.folder / "sample.npy", self.folder / "sample.json"
        saved = self._saved()
        before = {} if saved is None else saved.settings
        changed = [name for name in settings if saved is not None and before.get(name) != settings[name]]
        if changed and not overwrite:
            listed = "; ".join(f"{name} was {before.get(name)}, is {settings[name]}" for name in changed)
            raise ConfigError(
                f"{self.folder} holds an unfinished fit of other settings: {listed}. Give those again to go on, or "
                "remove that folder"
            )
        if changed:
            self.remove()

    def load(self) -> Sample | None:
        """The sample that an earlier run drew, if there is one. DataError where it is damaged."""
        saved = self._saved()
        if saved is None:
            return None
        try:
            source = NpyRows(self._rows)
        except (OSError, ValueError) as error:
            raise DataError(f"the unfinished fit in {self.folder} is damaged, remove it: {error}") from error
        return Sample(source.read(0, source.shape[0]), saved.images, saved.patches)

    def save(self, sample: Sample) -> None:
        """Keep the sample; what an earlier run left half-written goes. DataError, leaving nothing, on a full disk."""
        self.remove()
        dtype = str(sample.rows.dtype).removeprefix("torch.")
        described = dataclasses.asdict(Description(sample.images, sample.patches, self.settings))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._rows) as partial, NpyWriter(partial, dtype, tuple(sample.rows.shape[1:])) as file:
                for rows in sample.rows.split(ROWS_AT_ONCE):
                    file.append(rows.numpy())
                file.close()
            write_whole(self._description, json.dumps(described, indent=1) + "\n")
        except OSError as error:
            self.remove()
            raise DataError(
                f"cannot keep the sample of the fit in {self.folder}: {error.strerror or error}; make room, or give "
                "--fit-save-every 0"
            ) from error

    def remove(self) -> None:
        """Forget it: the fit is done, or not wanted. What others put beside its files stays."""
        for path in (self._description, self._rows, self.kmeans):  # the description says that the others are ours
            with suppress(OSError):
                path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _saved(self) -> Description | None:
        try:
            return read_record(self._description, Description)
        except UnreadableFile as error:
            if error.missing:
                return None
            raise DataError(f"the unfinished fit in {self.folder} is damaged, remove it: {error}") from error
