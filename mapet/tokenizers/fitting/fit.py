"""The tokenizer that a cache is made with: the one that is saved in a folder, or a new one, fitted and saved there.

A fit is over a sample of features in files (`mapet.tokenizers.fitting.sample`), in the folder `fit` of the tokenizer
until that is saved, or in a folder of its own, which stays. One that was killed goes on from what is there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mapet.config import Precision
from mapet.data.cache_writer import cache_staging, check_replaceable
from mapet.data.feed import check_shared_memory
from mapet.data.images import ImageSource
from mapet.data.jobs import Reading
from mapet.data.manifest import MANIFEST
from mapet.distributed import World
from mapet.errors import ConfigError, DataError
from mapet.folders import (
    SAMPLE,
    TOKENIZER,
    BusyFolder,
    check_apart,
    check_name,
    check_place,
    check_writable,
    drop,
    locked,
)
from mapet.progress import duration
from mapet.tokenizers import load_tokenizer, make_tokenizer, store
from mapet.tokenizers.fitting.sample import MAX_PATCHES, OWN_FILES, STATE, sample_features
from mapet.tokenizers.kmeans import ROWS_PER_ENTRY, KMeansTokenizer
from mapet.tokenizers.usage import FitReport
from mapet.words import say
from mapet_kernels.kmeans import Iteration, Settings, share_of_rows

SETTINGS = ("image_size", "patch_size", "vocabulary", "precision")
SECONDS_BETWEEN_ITERATIONS = 1.0


@dataclass(frozen=True)
class WantedTokenizer:
    """What is asked of a tokenizer, as in `make_tokenizer`; nothing where it is None."""

    tokenizer: str | None = None
    image_size: int | None = None
    patch_size: int | None = None
    vocabulary: int | None = None
    precision: Precision | None = None
    weights: Path | None = None
    compile: bool = False

    def new(self, device: torch.device, codebook: Path | None = None) -> KMeansTokenizer:
        """A new tokenizer, where nothing is asked with the paper's sizes."""
        given = {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}
        name = self.tokenizer or "pixel"
        return self.checked(make_tokenizer(name, device=device, weights=self.weights, codebook=codebook, **given))

    def saved(self, folder: Path, device: torch.device) -> KMeansTokenizer:
        """The tokenizer in the folder. ConfigError where it is not the one that is asked for."""
        stored = store.read_manifest(folder)
        for option, found in {"tokenizer": stored.name, **stored.settings}.items():
            if (asked := vars(self).get(option)) is not None and asked != found:
                raise ConfigError(
                    f"--{option.replace('_', '-')} {asked}, but the tokenizer in {folder} has {found}; leave the "
                    "option out to use that tokenizer, or name a new folder with --codebook to fit another"
                )
        return self.checked(load_tokenizer(folder, device=device, weights=self.weights))

    def checked(self, tokenizer: KMeansTokenizer) -> KMeansTokenizer:
        """The tokenizer; ConfigError where --compile is for another kind."""
        if self.compile and tokenizer.network is None:
            raise ConfigError(f"tokenizer {tokenizer.name} has no network: --compile is for kclip")
        return tokenizer


@dataclass(frozen=True)
class FitConfig:
    """How a codebook is fitted.

    Attributes:
        images: to fit on, drawn at random; 0 for all.
        patches: per codebook entry to fit on at most, drawn at random.
        features: folder that the features of the sample go to, and stay in.
        save_every: seconds between saves of the k-means; 0 for none.
        seed, iterations, redos, init, tolerance: as in `mapet_kernels.kmeans.fit`.
    """

    images: int = 0
    patches: int = ROWS_PER_ENTRY
    features: Path | None = None
    save_every: float = 60.0
    seed: int = 1234
    iterations: int = 20
    redos: int = 5
    init: str = "random"
    tolerance: float = 0.0


@contextmanager
def found_or_fitted(
    folder: Path,
    wanted: WantedTokenizer,
    source: ImageSource,
    config: FitConfig,
    *,
    output: Path,
    given: bool = False,
    overwrite: bool = False,
    world: World,
    **reading: Any,
) -> Iterator[KMeansTokenizer]:
    """The tokenizer for the cache at `output`, of the folder or of the centroids in a .npy file; for the block.

    Its folder is locked for the block, that is until the cache is made, unless it may be others' too.

    Args:
        given: whether the folder was named; that of a cache is this cache's alone, and fitted anew with `overwrite`.
        reading: as in `fit_tokenizer`.
    """
    with ExitStack() as held:
        if folder.suffix == ".npy":
            yield wanted.new(world.device, folder)
            return
        check_name(folder, TOKENIZER, option="--codebook")

        places: dict[str, Any] = {"output": output, "features": config.features, "given": given, "overwrite": overwrite}
        if world.on_main(lambda: _is_saved(folder, held, **places)):
            tokenizer = wanted.saved(folder, world.device)
            if world.is_main:
                say(f"using the tokenizer {tokenizer.name} in {folder}: {tokenizer.codebook_source}")
        else:
            tokenizer = wanted.new(world.device)
            # Before a long fit, not after it.
            pixels = 3 * (tokenizer.image_size**2 + tokenizer.input_size**2)
            how = Reading(**reading)
            check_shared_memory(how.workers, min(how.batch_size, len(source)) * pixels, prefix="--")
            told = iteration_lines(config) if world.is_main else None
            report = fit_tokenizer(
                tokenizer, source, folder, config, overwrite=overwrite, world=world, on_iteration=told, **reading
            )
            if world.is_main:
                say(f"{report.summary()}\nsaved in {folder}")
        yield tokenizer


def _is_saved(
    folder: Path, held: ExitStack, *, output: Path, features: Path | None, given: bool, overwrite: bool
) -> bool:
    """Whether there is a tokenizer to load; if not, one can be fitted in the folder. For the main process."""

    def found() -> bool:
        return (folder / store.MANIFEST).exists() and (given or not overwrite)

    if not found():
        check_places(folder, output, features, overwrite)
        held.enter_context(locked(folder, TOKENIZER))
        return found()  # another process may have ended its fit since
    is_for_new_cache = not given and not (output / MANIFEST).exists()
    if is_for_new_cache or (folder / store.UNFINISHED).exists():
        try:
            held.enter_context(locked(folder, TOKENIZER))
            drop(folder / store.UNFINISHED, OWN_FILES)  # of a process that was killed when it had saved
        except BusyFolder:  # several processes may use one tokenizer, but not that of a cache they all make
            if is_for_new_cache:
                raise
        except DataError:  # a folder that may only be read
            pass
    return True


def fit_tokenizer(
    tokenizer: KMeansTokenizer,
    source: ImageSource,
    folder: Path,
    config: FitConfig,
    *,
    overwrite: bool = False,
    world: World | None = None,
    on_iteration: Callable[[Iteration], None] | None = None,
    **reading: Any,
) -> FitReport:
    """Fit a tokenizer on the images of a source and save it in the folder, whose lock the caller holds.

    Sampling and fit are shared among the processes of the world, and killed at any moment both go on with the same
    call, to the same codebook. Other settings are refused by name.

    Args:
        overwrite: drop an unfinished fit of other settings, also the k-means over features in a folder of their own.
        reading: as in `sample_features`.
    Raises:
        ConfigError: settings of the fit out of range, or not those of the unfinished k-means.
        DataError: as `sample_features`; fewer patches than codebook entries; the disk is full.
    """
    world, features = world or World(torch.device("cpu")), config.features or folder / store.UNFINISHED
    settings = {name: getattr(config, name) for name in ("iterations", "redos", "init", "seed", "tolerance")}
    try:
        Settings(tokenizer.vocabulary, max_points_per_centroid=config.patches, **settings)
    except ValueError as error:
        raise ConfigError(f"cannot fit tokenizer {tokenizer.name}: {error}") from error
    images = min(config.images or len(source), len(source))
    patches = images * tokenizer.grid**2
    tokenizer.check_enough(images, patches)
    # Features that stay are for other fits, too; those that go need not be many more than this one takes.
    enough = max(2 * config.patches * tokenizer.vocabulary, patches // 1000 + 1)
    max_patches = MAX_PATCHES if config.features else min(enough, MAX_PATCHES)
    state = features / STATE if config.save_every > 0 else None
    try:
        restart = overwrite and config.features is None
        options = {"seed": config.seed, "limit": config.images, "max_patches": max_patches}
        files = sample_features(source, tokenizer, features, world=world, restart=restart, **options, **reading)
        with ExitStack() as held:
            world.on_main(lambda: _hold(held, features))
            if world.is_main and config.features:
                say(files.summary())
            if world.is_main and overwrite:
                (features / STATE).unlink(missing_ok=True)
            report = tokenizer.fit(
                share_of_rows(files.open(), world.rank, world.size),
                images=files.images,
                patches=files.patches,
                rows_per_entry=config.patches,
                source=source.fingerprint(),
                checkpoint=state,
                save_every=config.save_every,
                on_iteration=on_iteration,
                **settings,
            )
            world.on_main(lambda: tokenizer.save(folder))
            if world.is_main:
                (features / STATE).unlink(missing_ok=True)
    except KeyboardInterrupt:
        if not features.exists():
            raise
        raise KeyboardInterrupt(f"stopped by Ctrl-C; the same command goes on with the fit in {features}") from None
    if world.is_main and not config.features:
        drop(features, OWN_FILES)
    return report


def _hold(held: ExitStack, features: Path) -> None:
    held.enter_context(locked(features, SAMPLE))


def check_places(folder: Path, output: Path, features: Path | None, overwrite: bool) -> None:
    """Raise before a long fit, not after it, when its results could not be kept."""
    check_place(folder, TOKENIZER, option="--codebook")
    check_apart({"--output": output, "--codebook": folder, "--features-dir": features})
    if not store.is_free(folder):
        raise ConfigError(f"--codebook {folder} is neither a tokenizer nor a .npy file nor a new folder")
    cache = cache_staging(output)
    check_replaceable(cache, overwrite)
    check_writable(cache.folder)
    check_writable(folder)
    if features is not None:
        check_place(features, SAMPLE, option="--features-dir")
        check_writable(features)


def iteration_lines(config: FitConfig) -> Callable[[Iteration], None]:
    """Tells of the iterations of a k-means on stderr, at most one a second; tokenizer.json keeps every objective."""
    last = time.monotonic()

    def tell(done: Iteration) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_ITERATIONS:
            last = time.monotonic()
            say(
                f"k-means: start {done.redo + 1}/{config.redos}, iteration {done.iteration + 1}/{config.iterations}, "
                f"objective {done.objective:.6g}, {done.splits} splits, {done.seconds:.1f} s, ETA {duration(done.eta)}",
                file=sys.stderr,
            )

    return tell
