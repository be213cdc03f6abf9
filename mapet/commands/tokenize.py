"""`mapet tokenize`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapet.commands.options import Tokenize
from mapet.config import ModelConfig, OptimConfig
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import cache_staging, check_replaceable
from mapet.data.feed import check_shared_memory
from mapet.data.images import ImageSource, open_source
from mapet.data.manifest import MANIFEST
from mapet.data.progress import progress
from mapet.data.report import TokenizeReport
from mapet.distributed import World, connect
from mapet.errors import ConfigError, DataError
from mapet.folders import (
    CACHE,
    SAMPLE,
    TOKENIZER,
    BusyFolder,
    check_apart,
    check_name,
    check_place,
    check_writable,
    locked,
)
from mapet.objectives import options
from mapet.progress import duration
from mapet.tokenizers import KClipTokenizer, Tokenizer, load_tokenizer, make_tokenizer, store
from mapet.tokenizers.encode import FitBatches, fit_batches, tokenize
from mapet.tokenizers.fitting.sample import MAX_PATCHES, sample_features
from mapet.tokenizers.fitting.unfinished import UnfinishedFit
from mapet.tokenizers.foreign.official_tokens import import_official
from mapet.words import say
from mapet_kernels.kmeans import Iteration, share_of_rows

SETTINGS = ("image_size", "patch_size", "vocabulary", "precision")
IN_MEMORY_BYTES = 4 * 2**30
"""A sample for the fit that is larger goes into files."""
PATIENCE = timedelta(days=30)
"""How long processes wait for the slowest, and for the main one while it fits."""
SECONDS_BETWEEN_ITERATIONS = 1.0


def run(options: Tokenize) -> int:
    """Make the cache, say how the codebook is used and what was skipped, and how to go on."""
    check_options(options)
    check_place(options.output, CACHE, staged=True)
    with connect(options.device, patience=PATIENCE) as world, ExitStack() as held:
        if options.fit:
            find_tokenizer(options, open_source(options.images), world, held)
            return 0
        report = import_tokens(options, world) if options.import_tokens else tokenize_images(options, world, held)
        if world.is_main:
            say(report.summary())
            say(f"next: {pretrain_line(report.output)}")
    return 0


def check_options(options: Tokenize) -> None:
    """ConfigError for options that belong to the other of the two ways to make a cache."""
    if bool(options.images) == bool(options.import_tokens):
        raise ConfigError("give --images to tokenise images, or --import-tokens to take tokens of the official code")
    if options.import_tokens and not (options.csv and options.root):
        raise ConfigError("--import-tokens needs --csv, the list of the images, and --root, the folder they are in")
    if options.images:
        given, why = ("csv", "root", "class_names"), "--import-tokens"
    else:
        given, why = ("codebook", "weights", "precision", "patch_size", "features_dir"), "--images"
    if options.import_tokens and options.fit:
        raise ConfigError("--fit can only be given with --images")
    if options.fit and options.codebook and options.codebook.suffix == ".npy":
        raise ConfigError(f"--fit makes a codebook, and --codebook {options.codebook} is one; name a new folder")
    if foreign := [f"--{name.replace('_', '-')}" for name in given if getattr(options, name) is not None]:
        raise ConfigError(f"{', '.join(foreign)} can only be given with {why}")


def import_tokens(options: Tokenize, world: World) -> TokenizeReport:
    """A cache of the tokens in official files."""
    files = options.import_tokens
    return import_official(
        files[0] if len(files) == 1 else files,
        options.csv,
        options.root,
        options.output,
        image_size=options.image_size or ModelConfig.image_size,
        vocabulary=options.vocabulary or ModelConfig.vocabulary,
        tokenizer=options.tokenizer or "kclip",
        class_names=options.class_names,
        batch_size=options.batch_size,
        workers=options.workers,
        patience=options.patience,
        max_skipped=options.max_skipped,
        overwrite=options.overwrite,
        shard_images=options.shard_images,
        world=world,
    )


def tokenize_images(options: Tokenize, world: World, held: ExitStack) -> TokenizeReport:
    """A cache of the tokens of images, by the tokenizer that is given, found or fitted."""
    source = open_source(options.images)
    tokenizer = find_tokenizer(options, source, world, held)
    if options.compile:
        tokenizer.compile(options.batch_size)
    return tokenize(
        source,
        tokenizer,
        options.output,
        image_size=tokenizer.image_size,
        batch_size=options.batch_size,
        workers=options.workers,
        patience=options.patience,
        device=world.device,
        max_skipped=options.max_skipped,
        overwrite=options.overwrite,
        shard_images=options.shard_images,
        world=world,
    )


def find_tokenizer(options: Tokenize, source: ImageSource, world: World, held: ExitStack) -> Tokenizer:
    """The tokenizer in --codebook, or one with the centroids there, or a new one, fitted and saved there.

    Its folder is locked until `held` ends, that is until the cache is made of it.
    """
    folder = options.codebook or options.output.with_name(f"{options.output.name}_tokenizer")
    if folder.suffix == ".npy":
        return check_compile(options, new_tokenizer(options, world.device, folder))
    check_name(folder, TOKENIZER, option="--codebook")
    if world.on_main(lambda: is_saved(options, folder, held)):
        check_same(options, folder)
        tokenizer = load_tokenizer(folder, device=world.device, weights=options.weights)
        if world.is_main:
            say(f"using the tokenizer {tokenizer.name} in {folder}: {tokenizer.codebook_source}")
        return check_compile(options, tokenizer)
    tokenizer = new_tokenizer(options, world.device)
    # Before a long fit, not after it.
    check_compile(options, tokenizer)
    pixels = 3 * (tokenizer.image_size**2 + tokenizer.input_size**2)
    check_shared_memory(options.workers, min(options.batch_size, len(source)) * pixels, prefix="--")
    if features_folder(options, source, tokenizer):
        fit_files(options, source, tokenizer, folder, world, held)
        return tokenizer
    world.on_main(lambda: fit_in_memory(options, source, tokenizer, folder))
    return tokenizer if world.is_main else load_tokenizer(folder, device=world.device, weights=options.weights)


def is_saved(options: Tokenize, folder: Path, held: ExitStack) -> bool:
    """Whether there is a tokenizer to load; if not, one can be fitted in the folder. For the main process."""

    def found() -> bool:
        return (folder / store.MANIFEST).exists() and bool(options.codebook or not options.overwrite)

    if not found():
        check_places(options, folder)
        held.enter_context(locked(folder, TOKENIZER))
        return found()  # another process may have ended its fit since
    is_for_new_cache = options.codebook is None and not (options.output / MANIFEST).exists()
    if not is_for_new_cache and not (folder / store.UNFINISHED).exists():
        return True
    try:
        held.enter_context(locked(folder, TOKENIZER))
        UnfinishedFit(folder, {}).remove()
    except BusyFolder:  # several processes may use one tokenizer, but not that of a cache they all make
        if is_for_new_cache:
            raise
    except DataError:  # a folder that may only be read
        pass
    return True


def features_folder(options: Tokenize, source: ImageSource, tokenizer: Tokenizer) -> Path | None:
    """Where the sample for the fit goes; None for memory."""
    images = min(options.fit_images or len(source), len(source))
    rows = min(images * tokenizer.grid**2, MAX_PATCHES)
    if options.features_dir is None and rows * tokenizer.feature_size * 2 <= IN_MEMORY_BYTES:
        return None
    return options.features_dir or options.output.with_name(f"{options.output.name}_features")


def fit_settings(options: Tokenize) -> dict[str, Any]:
    """Settings of the k-means, whatever it is over."""
    return {
        "seed": options.seed,
        "iterations": options.fit_iterations,
        "redos": options.fit_redos,
        "init": options.fit_init,
        "tolerance": options.fit_tolerance,
    }


def fit_in_memory(options: Tokenize, source: ImageSource, tokenizer: Tokenizer, folder: Path) -> None:
    """Fit over a sample in this process's memory and save the tokenizer; or go on with a fit that was stopped there."""
    batches = fit_batches(
        source,
        tokenizer,
        batch_size=options.batch_size,
        workers=options.workers,
        patience=options.patience,
        seed=options.seed,
        limit=options.fit_images,
        max_skipped=options.max_skipped,
    )
    settings = fit_settings(options) | {
        "max_rows": options.fit_patches * tokenizer.vocabulary,
        "source": batches.fingerprint(),
    }
    unfinished = None
    if options.fit_save_every > 0:
        network = tokenizer.network and tokenizer.network.sha256
        described = {**settings, "tokenizer": tokenizer.name, **tokenizer.settings(), "network": network}
        unfinished = UnfinishedFit(folder, described, overwrite=options.overwrite)
    try:
        tokenizer.fit(
            shown(batches),
            **settings,
            unfinished=unfinished,
            save_every=options.fit_save_every,
            on_iteration=iteration_lines(options),
        )
    except KeyboardInterrupt:
        if unfinished is None or not unfinished.folder.exists():
            raise
        raise KeyboardInterrupt(f"stopped by Ctrl-C; the same command goes on with the fit in {folder}") from None
    save_fitted(tokenizer, folder)
    if unfinished is not None:
        unfinished.remove()


def fit_files(
    options: Tokenize, source: ImageSource, tokenizer: Tokenizer, folder: Path, world: World, held: ExitStack
) -> None:
    """Sample features into files and fit over them, both shared among the processes; save the tokenizer."""
    files = sample_features(
        source,
        tokenizer,
        features_folder(options, source, tokenizer),
        seed=options.seed,
        limit=options.fit_images,
        batch_size=options.batch_size,
        workers=options.workers,
        patience=options.patience,
        max_skipped=options.max_skipped,
        world=world,
    )
    world.on_main(lambda: _keep(held, files.folder, SAMPLE))
    checkpoint = files.folder / "kmeans" if options.fit_save_every > 0 else None
    if world.is_main:
        say(files.summary())
        if checkpoint and options.overwrite:
            checkpoint.unlink(missing_ok=True)
    tokenizer.fit_rows(
        share_of_rows(files.open(), world.rank, world.size),
        images=files.images,
        patches=files.patches,
        **fit_settings(options),
        rows_per_entry=options.fit_patches,
        source=source.fingerprint(),
        checkpoint=checkpoint,
        save_every=options.fit_save_every,
        on_iteration=iteration_lines(options) if world.is_main else None,
    )
    world.on_main(lambda: save_fitted(tokenizer, folder))
    if world.is_main and checkpoint:
        checkpoint.unlink(missing_ok=True)


def save_fitted(tokenizer: Tokenizer, folder: Path) -> None:
    """Save it, and say how the fit went."""
    tokenizer.save(folder)
    say(f"{tokenizer.report.summary()}\nsaved in {folder}")


def new_tokenizer(options: Tokenize, device: torch.device, codebook: Path | None = None) -> Tokenizer:
    """A tokenizer with the options' settings, where they say nothing the paper's."""
    return make_tokenizer(
        options.tokenizer or "pixel",
        device=device,
        weights=options.weights,
        codebook=codebook,
        **{name: value for name in SETTINGS if (value := getattr(options, name)) is not None},
    )


def check_compile(options: Tokenize, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer; ConfigError when --compile is for another kind."""
    if options.compile and not isinstance(tokenizer, KClipTokenizer):
        raise ConfigError(f"tokenizer {tokenizer.name} has no network: --compile is for kclip")
    return tokenizer


def check_same(options: Tokenize, folder: Path) -> None:
    """ConfigError when an option says something else than the tokenizer saved in the folder."""
    stored = store.read_manifest(folder)
    saved = {"tokenizer": stored.name, **stored.settings}
    for name in ("tokenizer", *SETTINGS):
        given = getattr(options, name)
        if given is not None and name in saved and given != saved[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} {given}, but the tokenizer in {folder} has {saved[name]}; leave the "
                "option out to use that tokenizer, or name a new folder with --codebook to fit another"
            )


def check_places(options: Tokenize, folder: Path) -> None:
    """Raise before a long fit, not after it, when its results could not be kept."""
    check_place(folder, TOKENIZER, option="--codebook")
    check_apart({"--output": options.output, "--codebook": folder, "--features-dir": options.features_dir})
    if not store.is_free(folder):
        raise ConfigError(f"--codebook {folder} is neither a tokenizer nor a .npy file nor a new folder")
    cache = cache_staging(options.output)
    check_replaceable(cache, options.overwrite)
    check_writable(cache.folder)
    if options.features_dir is not None:
        check_place(options.features_dir, SAMPLE, option="--features-dir")
        check_writable(options.features_dir)


def _keep(held: ExitStack, folder: Path, what: str) -> None:
    held.enter_context(locked(folder, what))


def shown(batches: FitBatches) -> Iterator[Tensor]:
    """The batches, with progress on stderr while they are read."""
    with progress(batches.images, "reading for the fit") as advance:
        for batch in batches:
            yield batch
            advance(len(batch))


def iteration_lines(options: Tokenize) -> Callable[[Iteration], None]:
    """Tells of the iterations of a k-means on stderr, at most one a second; tokenizer.json keeps every objective."""
    last = time.monotonic()

    def tell(done: Iteration) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_ITERATIONS:
            last = time.monotonic()
            say(iteration_line(done, options), file=sys.stderr)

    return tell


def iteration_line(done: Iteration, options: Tokenize) -> str:
    """Progress, objective and time left of a k-means, in one line."""
    return (
        f"k-means: start {done.redo + 1}/{options.fit_redos}, iteration {done.iteration + 1}/{options.fit_iterations}, "
        f"objective {done.objective:.6g}, {done.splits} splits, {done.seconds:.1f} s, ETA {duration(done.eta)}"
    )


def pretrain_line(folder: Path) -> str:
    """The command that pre-trains on a cache: a model of the sizes in it, and what it is too small for set lower."""
    cache = TokenCache.open(folder)
    sizes = {
        "image_size": cache.image_size,
        "patch_size": cache.image_size // cache.grid,
        "vocabulary": cache.vocabulary,
    }
    needed = [
        f" --model.{name.replace('_', '-')} {size}"
        for name, size in sizes.items()
        if size != getattr(ModelConfig, name)
    ]
    patches, usual = cache.grid**2, ModelConfig().grid ** 2
    if (cut := options("mapet").cut) >= patches:
        needed.append(f" --cut {max(1, round(cut * patches / usual))}")
    if len(cache) < OptimConfig.global_batch:
        needed.append(f" --batch {2 ** (len(cache).bit_length() - 1)}")  # the largest power of two
    return f"mapet pretrain --cache {shlex.quote(str(folder))}{''.join(needed)}"
