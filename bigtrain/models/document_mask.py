"""Attention that stays within documents when a sample holds several.

Positions say all there is to say: a document begins wherever they are 0.

Shape suffixes: B batch, T tokens, S tokens attended to, H query heads, G key/value heads, K head width.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def build_document_mask(positions_BT: Tensor, *, flex: bool) -> "Tensor | BlockMask":
    """Return who sees whom: tokens of the same document that are not later.

    Args:
        positions_BT: int64, counted from 0 at the beginning of each document.
        flex: for FlexAttention, which skips the blocks between documents, instead of one bool for each pair of tokens.

    Returns:
        bool ``(B, 1, T, S)``, or a ``BlockMask``.
    """
    documents_BT = (positions_BT == 0).cumsum(dim=1)
    batch, length = positions_BT.shape
    if not flex:
        same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
        return same_BTS.tril()[:, None]

    def sees(b: Tensor, _h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (documents_BT[b, t] == documents_BT[b, s]) & (t >= s)

    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(sees, batch, None, length, length, device=positions_BT.device)


def attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: "Tensor | BlockMask", *, dropout: float, gqa: bool
) -> Tensor:
    """Return the attention output ``(B, H, T, K)`` under a mask of :func:`build_document_mask`."""
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, dropout_p=dropout, enable_gqa=gqa)
    return _flex_attention(q_BHTK.is_cuda)(q_BHTK, k_BGSK, v_BGSK, block_mask=mask, enable_gqa=gqa)


@lru_cache(maxsize=2)
def _flex_attention(compiled: bool) -> Any:
    """Return FlexAttention; only compiled does it skip anything, on a CPU it is here to be tested."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
