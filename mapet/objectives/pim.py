"""PIM: permuted image modelling, XLNet's objective on image patches (paper, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from mapet.model.streams import StreamLayout
from mapet.objectives.two_stream import Objective
from mapet_kernels import two_stream_attention_packed


class PIM(Objective):
    """As MaPeT without mask tokens among the keys: a target knows nothing of the positions still to come.

    The query stream starts from the mask token and the target's own position. The paper does not state a cut for PIM;
    MaPeT's is used.
    """

    def layout(self, batch: int) -> StreamLayout:
        return StreamLayout(
            batch, self.config.tokens, self.cut, target_content=True, mask_tokens=False, query_stream=True
        )

    def attention(self, q: Tensor, kv: Tensor, layout: StreamLayout) -> Tensor:
        return two_stream_attention_packed(q, kv, layout.cut, layout.targets, mask_tokens=False, backend=self.backend)
