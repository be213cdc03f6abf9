"""`mapet tokenize`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mapet.config import ModelConfig
from mapet.data.cache import TokenCache
from mapet.data.cache_writer import check_replaceable
from mapet.data.images import ImageSource, open_source
from mapet.data.official import import_official
from mapet.data.progress import progress
from mapet.data.report import TokenizeReport
from mapet.distributed import pick_device
from mapet.errors import ConfigError
from mapet.options import Tokenize
from mapet.progress import duration
from mapet.tokenize import FitBatches, fit_batches, tokenize
from mapet.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, store
from mapet.tokenizers.unfinished import FOLDER, UnfinishedFit
from mapet_kernels.kmeans import Iteration

SETTINGS = ("image_size", "patch_size", "vocabulary", "precision")
SECONDS_BETWEEN_ITERATIONS = 1.0


def run(options: Tokenize) -> int:
    """Make the cache, say how the codebook is used and what was skipped, and how to go on."""
    check_options(options)
    if options.fit:
        find_tokenizer(options, open_source(options.images), pick_device(options.device, None))
        return 0
    report = import_tokens(options) if options.import_tokens else tokenize_images(options)
    print(report.summary())
    print(f"next: {pretrain_line(report.output)}")
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
        given, why = ("codebook", "weights", "precision", "patch_size"), "--images"
    if options.import_tokens and options.fit:
        raise ConfigError("--fit can only be given with --images")
    if options.fit and options.codebook and options.codebook.suffix == ".npy":
        raise ConfigError(f"--fit makes a codebook, and --codebook {options.codebook} is one; name a new folder")
    if foreign := [f"--{name.replace('_', '-')}" for name in given if getattr(options, name) is not None]:
        raise ConfigError(f"{', '.join(foreign)} can only be given with {why}")


def import_tokens(options: Tokenize) -> TokenizeReport:
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
        max_skipped=options.max_skipped,
        overwrite=options.overwrite,
    )


def tokenize_images(options: Tokenize) -> TokenizeReport:
    """A cache of the tokens of images, by the tokenizer that is given, found or fitted."""
    device = pick_device(options.device, None)
    source = open_source(options.images)
    tokenizer = find_tokenizer(options, source, device)
    return tokenize(
        source,
        tokenizer,
        options.output,
        image_size=tokenizer.image_size,
        batch_size=options.batch_size,
        workers=options.workers,
        device=device,
        max_skipped=options.max_skipped,
        overwrite=options.overwrite,
    )


def find_tokenizer(options: Tokenize, source: ImageSource, device: torch.device) -> Tokenizer:
    """The tokenizer in --codebook, or one with the centroids there, or a new one, fitted and saved there."""
    folder = options.codebook or options.output.with_name(f"{options.output.name}_tokenizer")
    if folder.suffix == ".npy":
        return new_tokenizer(options, device, folder)
    if (folder / store.MANIFEST).exists() and (options.codebook or not options.overwrite):
        check_same(options, folder)
        tokenizer = load_tokenizer(folder, device=device, weights=options.weights)
        UnfinishedFit(folder, {}).remove()
        print(f"using the tokenizer {tokenizer.name} in {folder}: {tokenizer.codebook_source}")
        return tokenizer
    check_places(options, folder)
    tokenizer = new_tokenizer(options, device)
    batches = fit_batches(
        source,
        tokenizer,
        batch_size=options.batch_size,
        workers=options.workers,
        seed=options.seed,
        limit=options.fit_images,
        max_skipped=options.max_skipped,
    )
    fit_tokenizer(options, tokenizer, batches, folder)
    return tokenizer


def fit_tokenizer(options: Tokenize, tokenizer: Tokenizer, batches: FitBatches, folder: Path) -> None:
    """Fit the tokenizer and save it in the folder; or go on with a fit that was stopped there."""
    settings = {
        "seed": options.seed,
        "iterations": options.fit_iterations,
        "redos": options.fit_redos,
        "init": options.fit_init,
        "tolerance": options.fit_tolerance,
        "max_rows": options.fit_patches * tokenizer.vocabulary,
        "source": batches.fingerprint(),
    }
    unfinished = None
    if options.fit_save_every > 0:
        network = tokenizer.network and tokenizer.network.sha256
        described = {**settings, "tokenizer": tokenizer.name, **tokenizer.settings(), "network": network}
        unfinished = UnfinishedFit(folder, described, overwrite=options.overwrite)
    try:
        report = tokenizer.fit(
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
    tokenizer.save(folder)
    if unfinished is not None:
        unfinished.remove()
    print(f"{report.summary()}\nsaved in {folder}")


def new_tokenizer(options: Tokenize, device: torch.device, codebook: Path | None = None) -> Tokenizer:
    """A tokenizer with the options' settings, where they say nothing the paper's."""
    return make_tokenizer(
        options.tokenizer or "pixel",
        device=device,
        weights=options.weights,
        codebook=codebook,
        **{name: value for name in SETTINGS if (value := getattr(options, name)) is not None},
    )


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
    is_new = not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= {FOLDER})
    if not is_new and not (folder / store.MANIFEST).exists():
        raise ConfigError(f"--codebook {folder} is neither a tokenizer nor a .npy file nor a new folder")
    check_replaceable(options.output, options.overwrite)


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
            print(iteration_line(done, options), file=sys.stderr, flush=True)

    return tell


def iteration_line(done: Iteration, options: Tokenize) -> str:
    """Progress, objective and time left of a k-means, in one line."""
    return (
        f"k-means: start {done.redo + 1}/{options.fit_redos}, iteration {done.iteration + 1}/{options.fit_iterations}, "
        f"objective {done.objective:.6g}, {done.splits} splits, {done.seconds:.1f} s, ETA {duration(done.eta)}"
    )


def pretrain_line(folder: Path) -> str:
    """The command that pre-trains on a cache, for a model of the sizes in it."""
    cache = TokenCache.open(folder)
    sizes = {
        "image_size": cache.image_size,
        "patch_size": cache.image_size // cache.grid,
        "vocabulary": cache.vocabulary,
    }
    needed = [f" --set model.{name}={size}" for name, size in sizes.items() if size != getattr(ModelConfig, name)]
    return f"mapet pretrain --cache {folder}{''.join(needed)}"
