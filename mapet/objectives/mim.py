"""MIM: masked image modelling with random masks, BEiT without block-wise masking (paper, section 3 and Table 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.checked import at_least
from mapet.config import ModelConfig, ObjectiveConfig, short
from mapet.errors import FieldError
from mapet.model.streams import StreamLayout
from mapet.objectives.two_stream import TwoStreamTask


@dataclass(frozen=True)
class MIMConfig(ObjectiveConfig):
    """MIM masks patches at random and predicts them, all at once."""

    name: Literal["mim"] = "mim"
    masked: Annotated[int, at_least(1), short("--masked")] = 75
    """Patches that are masked and predicted. The paper does not state how many; 75 of 196 is the default of the
    official command line."""

    def check_model(self, model: ModelConfig) -> None:
        """FieldError unless some patch is left to see, or a class token is."""
        most = model.tokens - 1
        if self.masked > min(most, model.patches):
            raise FieldError(
                "objective.masked",
                f"objective.masked must be in [1, {min(most, model.patches)}] with {model.patches} patches an image, "
                f"got {self.masked}",
            )


class MIM(TwoStreamTask):
    """Random patches are replaced by the mask token, and their visual tokens are predicted.

    One stream of N rows, unmasked tokens first, in which every row sees every row, by torch's own attention.
    """

    Options = MIMConfig

    @property
    def cut(self) -> int:
        return self.config.tokens - self.options.masked

    def layout(self, batch: int) -> StreamLayout:
        return StreamLayout(
            batch, self.config.tokens, self.cut, target_content=False, mask_tokens=True, query_stream=False
        )

    def attention(self, q: Tensor, kv: Tensor, layout: StreamLayout) -> Tensor:
        k, v = (x.transpose(1, 2) for x in kv.unbind(2))  # (B, H, N, d)
        q = q.unflatten(0, (layout.batch, -1)).transpose(1, 2)  # (B, H, N or T, d)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing: torch's own attention runs anywhere."""
