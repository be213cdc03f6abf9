"""What the Triton backend of prefix-suffix attention is given: the rule and the options of one call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Who sees whom (visibility.py), and the factor of the scores."""

    shift: Tensor  # s, int64 (R,) or (B, R)
    cut: int | Tensor  # c, or int64 (B,)
    suffix_keys: int  # S
    scale: float

    @property
    def per_image(self) -> bool:
        """Whether images differ in what their rows see."""
        return self.shift.dim() == 2 or isinstance(self.cut, Tensor)
