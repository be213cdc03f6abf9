"""What came out of making a token cache, for the person who made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mapet.data.manifest import Skipped
from mapet.tokenizers.usage import CodebookUsage

SHOWN = 10
REMEDIES = {
    "decode": "more --workers, or a faster disk",
    "network": "more GPUs, --precision fp16 or --compile",
    "assign": "more GPUs, or a smaller vocabulary",
    "write": "a faster disk",
}
"""What makes a stage faster."""


@dataclass(frozen=True)
class TimeUse:
    """Where the time of encoding went, over all processes.

    Attributes:
        seconds: from the first image to the last, of the slowest process.
        images: that were read in them, by all processes.
        waited: seconds by stage that the processes waited for it, added up: decode, network, assign, write.
        total: seconds of all processes, added up.
    """

    seconds: float
    images: int
    waited: Mapping[str, float]
    total: float

    @classmethod
    def over(cls, used: Sequence[TimeUse]) -> TimeUse:
        """Of all processes, from that of each."""
        names = dict.fromkeys(name for one in used for name in one.waited)
        return cls(
            seconds=max(one.seconds for one in used),
            images=sum(one.images for one in used),
            waited={name: sum(one.waited.get(name, 0.0) for one in used) for name in names},
            total=sum(one.total for one in used),
        )

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def shares(self) -> dict[str, float]:
        """Part of the time by stage, and what is left as "other"; the parts add up to 1, or there are none."""
        if not self.total:
            return {}
        shares = {name: seconds / self.total for name, seconds in self.waited.items()}
        return {**shares, "other": max(0.0, 1 - sum(shares.values()))}

    @property
    def bottleneck(self) -> str | None:
        """The stage that most of the time was waited for; None where nothing was measured."""
        return max(self.waited, key=self.waited.__getitem__, default=None)

    def line(self) -> str:
        """One line of text."""
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares().items())
        remedy = REMEDIES.get(self.bottleneck or "")
        return f"time waited for: {shares}; the bottleneck is {self.bottleneck}" + (f" ({remedy})" if remedy else "")


@dataclass(frozen=True)
class TokenizeReport:
    """Result of `tokenize` or `import_official`.

    Attributes:
        output: the cache's folder.
        images: images in the cache.
        skipped: images left out, with the reason.
        time: of this run; nothing for a reused cache.
        usage: codebook usage of all tokens of the cache.
        reused: a complete cache of the same images, tokenizer and sizes was there already.
        shards: of the cache; `resumed` of them were finished by an earlier run.
    """

    output: Path
    images: int
    skipped: tuple[Skipped, ...]
    usage: CodebookUsage
    reused: bool
    time: TimeUse = field(default_factory=lambda: TimeUse(0.0, 0, {}, 0.0))
    shards: int = 0
    resumed: int = 0

    @property
    def images_per_second(self) -> float:
        return self.time.images_per_second

    def summary(self) -> str:
        """A few lines of text."""
        how = "reused as it is" if self.reused else f"{self.images_per_second:.1f} images/s"
        usage = self.usage
        lines = [f"{self.output}: {self.images} images, {how}"]
        if self.resumed:
            lines.append(
                f"{self.resumed} of {self.shards} shards were finished by an earlier run, and are as it left them"
            )
        if self.time.waited:
            lines.append(self.time.line())
        lines.append(
            f"codebook: {usage.vocabulary - len(usage.dead)} of {usage.vocabulary} entries used, "
            f"perplexity {usage.perplexity:.1f}"
        )
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} images (all are listed in the manifest):")
            lines.extend(f"  {item.reason}" for item in self.skipped[:SHOWN])
        return "\n".join(lines)
