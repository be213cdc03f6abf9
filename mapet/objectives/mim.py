"""MIM: masked image modelling with random masks, BEiT without block-wise masking (paper, section 3.1 and Table 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mapet.model.streams import StreamLayout
from mapet.objectives.two_stream import Objective


class MIM(Objective):
    """N - cut random patches are replaced by the mask token, and their visual tokens are predicted, all at once.

    One stream of N rows, unmasked tokens first, in which every row sees every row. The paper masks 75 of 196 patches:
    cut = 122 with a class token.
    """

    def layout(self, batch: int) -> StreamLayout:
        return StreamLayout(
            batch, self.config.tokens, self.cut, target_content=False, mask_tokens=True, query_stream=False
        )

    def attention(self, q: Tensor, kv: Tensor, layout: StreamLayout) -> Tensor:
        k, v = (x.transpose(1, 2) for x in kv.unbind(2))  # (B, H, N, d)
        q = q.unflatten(0, (layout.batch, -1)).transpose(1, 2)  # (B, H, N or T, d)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
