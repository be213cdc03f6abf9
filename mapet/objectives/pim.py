"""PIM: permuted image modelling, XLNet's objective on image patches (paper, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mapet.model.streams import StreamLayout
from mapet.objectives.two_stream import CutConfig, TwoStreamTask
from mapet_kernels import two_stream_attention_packed


@dataclass(frozen=True)
class PIMConfig(CutConfig):
    """PIM predicts by a query stream, which knows nothing of what comes later. The paper states no cut for it."""

    name: Literal["pim"] = "pim"


class PIM(TwoStreamTask):
    """As MaPeT without mask tokens among the keys: a target knows nothing of the positions still to come.

    The query stream starts from the mask token and the target's own position.
    """

    Options = PIMConfig

    def layout(self, batch: int) -> StreamLayout:
        return StreamLayout(
            batch, self.config.tokens, self.cut, target_content=True, mask_tokens=False, query_stream=True
        )

    def attention(self, q: Tensor, kv: Tensor, layout: StreamLayout) -> Tensor:
        return two_stream_attention_packed(q, kv, layout.cut, layout.targets, mask_tokens=False, backend=self.backend)
