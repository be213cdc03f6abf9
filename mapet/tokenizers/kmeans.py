"""The k-means family: features of the patches of an image, and the nearest entry of a codebook fitted to such."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import mapet.tokenizers.store as store
from mapet.data.stages import stage
from mapet.errors import ConfigError, DataError
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.usage import CodebookUsage, FitReport, repeated_entries, warn_of_collapse
from mapet_kernels import kmeans, kmeans_assign

ROWS_PER_ENTRY = 512
"""Patches per codebook entry that the k-means uses at most (k-CLIP's max_points_per_centroid)."""


class KMeansTokenizer(Tokenizer):
    """A token is the entry of a codebook (K, F) nearest to the feature of its patch; members say what features are."""

    def __init__(self, image_size: int, patch_size: int, vocabulary: int, device: str | torch.device = "cpu") -> None:
        super().__init__(image_size, patch_size, vocabulary, device)
        self.report: FitReport | None = None
        self.codebook_source = ""
        self._codebook: Tensor | None = None

    @property
    @abstractmethod
    def feature_size(self) -> int:
        """Numbers in a feature, F."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, input_size, input_size) -> floating point (b, P, F), patches in raster order."""

    @property
    def codebook(self) -> Tensor:
        """(K, F) float32. DataError before there is one."""
        if self._codebook is None:
            raise DataError(f"tokenizer {self.name} has no codebook yet: fit one, or load a saved tokenizer")
        return self._codebook

    def set_codebook(self, codebook: Tensor, source: str) -> None:
        """Use a codebook (K, F). DataError, naming the source, unless it fits and is finite."""
        expected = (self.vocabulary, self.feature_size)
        if tuple(codebook.shape) != expected:
            raise DataError(
                f"{source} is a codebook of shape {tuple(codebook.shape)}, tokenizer {self.name} needs {expected}"
            )
        if not codebook.isfinite().all():
            raise DataError(f"{source} is a codebook with NaN or infinity")
        self._codebook = codebook.detach().to(self.device, torch.float32).contiguous()
        self.codebook_source, self.report = source, None

    def fit(
        self,
        rows: Tensor | kmeans.RowSource,
        *,
        images: int,
        patches: int,
        seed: int = 1234,
        iterations: int = 20,
        redos: int = 5,
        init: str = "random",
        tolerance: float = 0.0,
        rows_per_entry: int = ROWS_PER_ENTRY,
        source: str = "",
        checkpoint: Path | None = None,
        save_every: float = 0.0,
        on_iteration: Callable[[kmeans.Iteration], None] | None = None,
    ) -> FitReport:
        """Make the codebook: k-means over features (n, F), a sample of so many `patches` of so many `images`.

        Under torch.distributed every process calls this with its share of the rows, and all get the same codebook.

        Args:
            rows_per_entry: of more rows per codebook entry so many are used, drawn at random.
            source: fingerprint of the images, for the record.
            checkpoint: file for the state of the k-means, written every `save_every` seconds; a fit that was killed
                goes on from there, to the same codebook. The caller removes it in the end.
            seed, iterations, redos, init, tolerance, on_iteration: as in `mapet_kernels.kmeans.fit`.

        Returns:
            The report, also kept as `report`; the usage in it is that of the last iteration. A collapsed codebook is
            reported there and as a CollapseWarning.

        Raises:
            DataError: fewer patches than codebook entries.
            ConfigError: settings of the k-means out of range, or rows that it does not take.
        """
        settings: dict[str, Any] = {"seed": seed, "iterations": iterations, "init": init, "tolerance": tolerance}
        self.check_enough(images, patches)
        try:
            result = kmeans.fit(
                rows,
                self.vocabulary,
                device=self.device,
                redos=redos,
                **settings,
                max_points_per_centroid=rows_per_entry,
                checkpoint=checkpoint,
                checkpoint_seconds=save_every,
                on_iteration=on_iteration,
            )
        except ValueError as error:
            raise ConfigError(f"cannot fit tokenizer {self.name}: {error}") from error
        self.set_codebook(result.centroids, f"k-means of {result.rows} patches of {images} images, seed {seed}")
        usage = CodebookUsage(result.counts.cpu().numpy(), len(repeated_entries(self.codebook)))
        self.report = FitReport(
            tokenizer=self.name,
            features=self.feature_size,
            images=images,
            patches=patches,
            rows=result.rows,
            **settings,
            objectives=result.objectives,
            redo=result.redo,
            splits=result.splits,
            usage=usage,
            max_rows=rows_per_entry * self.vocabulary,
            source=source,
        )
        warn_of_collapse(usage, self.name)
        return self.report

    def check_enough(self, images: int, patches: int) -> None:
        """DataError where these are too few to fit on."""
        if patches < self.vocabulary:
            raise DataError(
                f"{images} images have {patches} patches, too few for a vocabulary of {self.vocabulary}: "
                "give more images or lower the vocabulary"
            )

    def tokens(self, images: Tensor) -> Tensor:
        """The nearest entries by squared L2; the assignment is exact."""
        with stage("network", self.device):
            features = self.features(images)
        with stage("assign", self.device):
            try:
                ids = kmeans_assign(features.flatten(0, 1), self.codebook)
            except ValueError as error:
                raise DataError(f"tokenizer {self.name} cannot encode: {error}") from error
        return ids.view(features.shape[:2])

    def fingerprint(self) -> str:
        """SHA-256, as hexadecimal text, of all that decides the tokens: settings, network weights and codebook."""
        parts = {
            "name": self.name,
            "settings": self.settings(),
            "network": self.network and [self.network.architecture, self.network.sha256],
            "codebook": hashlib.sha256(self.codebook.cpu().numpy()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write codebook.safetensors and tokenizer.json into the folder. DataError where they cannot be written."""
        stored = store.StoredTokenizer(
            name=self.name,
            settings=self.settings(),
            input_size=self.input_size,
            grid=self.grid,
            features=self.feature_size,
            network=vars(self.network) if self.network else None,
            fingerprint=self.fingerprint(),
            codebook_source=self.codebook_source,
        )
        store.write(Path(folder), stored, self.codebook, self.report)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu", **options: Any) -> Self:
        """The tokenizer saved in the folder; `options` go to the constructor (k-CLIP takes weights).

        DataError names what is missing, damaged or different from what was saved.
        """
        folder = Path(folder)
        stored, codebook, report = store.read(folder)
        if stored.name != cls.name:
            raise DataError(f"{folder} holds a tokenizer {stored.name}, not {cls.name}")
        settings: dict[str, Any] = {**stored.settings, **options}
        try:
            tokenizer = cls(**settings, device=device)
        except (TypeError, ConfigError) as error:
            raise DataError(f"{folder / store.MANIFEST} has settings {cls.name} does not take: {error}") from error
        tokenizer._check_network(stored, folder)
        tokenizer.set_codebook(codebook, str(folder / store.CODEBOOK))
        if tokenizer.fingerprint() != stored.fingerprint:
            raise DataError(f"{folder / store.MANIFEST} does not describe {store.CODEBOOK}: the fingerprints differ")
        tokenizer.codebook_source, tokenizer.report = stored.codebook_source, report
        return tokenizer

    def _check_network(self, stored: store.StoredTokenizer, folder: Path) -> None:
        if self.network is None or stored.network is None:
            return
        for what in ("architecture", "sha256"):
            saved, given = stored.network.get(what), getattr(self.network, what)
            if saved != given:
                raise DataError(
                    f"the codebook in {folder} was made with another network than {self.network.source}: its {what} is "
                    f"{saved}, not {given}"
                )
