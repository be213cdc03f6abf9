"""MaPeT: masked and permuted prediction of visual tokens with two streams (paper, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mapet.model.streams import StreamLayout
from mapet.objectives.two_stream import CutConfig, TwoStreamTask
from mapet_kernels import two_stream_attention_packed


@dataclass(frozen=True)
class MaPeTConfig(CutConfig):
    """MaPeT predicts by a query stream, with mask tokens in place of what comes later."""

    name: Literal["mapet"] = "mapet"


class MaPeT(TwoStreamTask):
    """Each target is predicted from the tokens before it in the permutation, and from the positions of all others.

    The query stream predicts; its row for target i sees the non-targets, the content of targets 0..i-1 and the mask
    tokens of targets i..T-1, so that every prediction knows the position of all N tokens.
    """

    Options = MaPeTConfig

    def layout(self, batch: int) -> StreamLayout:
        return StreamLayout(
            batch, self.config.tokens, self.cut, target_content=True, mask_tokens=True, query_stream=True
        )

    def attention(self, q: Tensor, kv: Tensor, layout: StreamLayout) -> Tensor:
        return two_stream_attention_packed(q, kv, layout.cut, layout.targets, backend=self.backend)
