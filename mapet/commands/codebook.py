"""`mapet codebook`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from torch import Tensor

from mapet.commands.options import Codebook
from mapet.data.cache import TokenCache
from mapet.errors import DataError
from mapet.report.codebook import write_codebook_report
from mapet.tokenizers import store
from mapet.words import say


def run(options: Codebook) -> int:
    """Write the report and say where it is."""
    cache = TokenCache.open(options.cache)
    path = write_codebook_report(
        cache,
        options.output,
        codebook=find_codebook(options, cache),
        chosen=options.entries,
        rows=options.rows,
        floor=options.floor,
        seed=options.seed,
        command=shlex.join(["mapet", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("mapet", "__main__") else "",
    )
    say(f"{path}: {len(cache)} images, {cache.vocabulary} entries")
    return 0


def find_codebook(options: Codebook, cache: TokenCache) -> Tensor | None:
    """The codebook that made the cache's tokens, from --codebook or from beside the cache; None where there is none."""
    folder = options.codebook or options.cache.with_name(f"{options.cache.name}_tokenizer")
    if options.codebook is None and not (folder / store.MANIFEST).exists():
        return None
    stored, codebook, _ = store.read(folder)
    if stored.fingerprint == cache.manifest.description.tokenizer_fingerprint and len(codebook) == cache.vocabulary:
        return codebook
    if options.codebook is None:
        return None
    raise DataError(
        f"the tokens of {options.cache} were not made by the tokenizer in {folder}: the fingerprints differ"
    )
