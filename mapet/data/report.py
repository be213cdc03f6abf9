"""What came out of making a token cache, for the person who made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mapet.codebook import CodebookUsage
from mapet.data.manifest import Skipped

SHOWN = 10


@dataclass(frozen=True)
class TokenizeReport:
    """Result of `tokenize` or `import_official`.

    Attributes:
        output: the cache's folder.
        images: images in the cache.
        skipped: images left out, with the reason.
        seconds: time spent on images; 0 for a reused cache.
        usage: codebook usage of all tokens of the cache.
        reused: a complete cache of the same images, tokenizer and sizes was there already.
    """

    output: Path
    images: int
    skipped: tuple[Skipped, ...]
    seconds: float
    usage: CodebookUsage
    reused: bool

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def summary(self) -> str:
        """A few lines of text."""
        how = "reused as it is" if self.reused else f"{self.images_per_second:.1f} images/s"
        usage = self.usage
        lines = [
            f"{self.output}: {self.images} images, {how}",
            f"codebook: {usage.vocabulary - len(usage.dead)} of {usage.vocabulary} entries used, "
            f"perplexity {usage.perplexity:.1f}",
        ]
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} images (all are listed in the manifest):")
            lines.extend(f"  {item.reason}" for item in self.skipped[:SHOWN])
        return "\n".join(lines)
