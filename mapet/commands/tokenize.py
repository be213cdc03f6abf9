"""`mapet tokenize`."""

from __future__ import annotations

import shlex
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from mapet.commands.options import Tokenize
from mapet.config import ModelConfig, OptimConfig
from mapet.data.cache import TokenCache
from mapet.data.sources import open_source
from mapet.distributed import World, connect
from mapet.errors import ConfigError
from mapet.folders import CACHE, check_place
from mapet.objectives import options
from mapet.tokenizers.encode import TokenizeReport, tokenize
from mapet.tokenizers.fitting.fit import FitConfig, WantedTokenizer, found_or_fitted
from mapet.tokenizers.foreign.official_tokens import import_official
from mapet.words import say

PATIENCE = timedelta(days=30)
"""How long processes wait for the slowest."""


def run(options: Tokenize) -> int:
    """Make the cache, say how the codebook is used and what was skipped, and how to go on."""
    check_options(options)
    check_place(options.output, CACHE, staged=True)
    with connect(options.device, patience=PATIENCE) as world:
        report = (import_tokens if options.import_tokens else tokenize_images)(options, world)
        if report and world.is_main:
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
        tokenizer=options.tokenizer,
        class_names=options.class_names,
        overwrite=options.overwrite,
        shard_images=options.shard_images,
        world=world,
        **reading(options),
    )


def tokenize_images(options: Tokenize, world: World) -> TokenizeReport | None:
    """A cache of the tokens of images, by the tokenizer that is given, found or fitted; none for --fit."""
    source = open_source(options.images)
    folder = options.codebook or options.output.with_name(f"{options.output.name}_tokenizer")
    wanted = WantedTokenizer(**{field.name: getattr(options, field.name) for field in fields(WantedTokenizer)})
    settings = ("images", "patches", "save_every", "iterations", "redos", "init", "tolerance")
    given = {name: getattr(options, f"fit_{name}") for name in settings}
    config = FitConfig(features=options.features_dir, seed=options.seed, **given)
    places = {"output": options.output, "given": options.codebook is not None, "overwrite": options.overwrite}
    with found_or_fitted(folder, wanted, source, config, **places, world=world, **reading(options)) as tokenizer:
        if options.fit:
            return None
        if options.compile:
            tokenizer.compile(options.batch_size)
        return tokenize(
            source,
            tokenizer,
            options.output,
            image_size=tokenizer.image_size,
            device=world.device,
            overwrite=options.overwrite,
            shard_images=options.shard_images,
            world=world,
            **reading(options),
        )


def reading(options: Tokenize) -> dict[str, Any]:
    """How images are read."""
    return {name: getattr(options, name) for name in ("batch_size", "workers", "patience", "max_skipped")}


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
