"""Attention within documents, where a sample packs several; a document begins wherever positions are 0.

Shape suffixes: B batch, T tokens, S tokens attended to, H query heads, G key/value heads, K head width; N blocks of
tokens, M blocks of tokens attended to.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK_TOKENS = 128  # what FlexAttention's kernels skip or compute as a whole
_compile_once = functools.cache(torch.compile)


def build_document_mask(positions_BT: Tensor, *, flex: bool) -> "Tensor | BlockMask":
    """Return a causal mask within documents, bool ``(B, 1, T, S)`` or a ``BlockMask``; positions begin at 0 in each."""
    documents_BT = (positions_BT == 0).cumsum(dim=1)
    if flex:
        return _block_mask(documents_BT)
    same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTS.tril()[:, None]


def _block_mask(documents_BT: Tensor) -> "BlockMask":
    """Build the block mask from the first and last document of each block, without a T x T matrix."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b: Tensor, _h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (documents_BT[b, t] == documents_BT[b, s]) & (t >= s)

    length = documents_BT.shape[1]
    # Padding of the last block is a document of its own, later than all others.
    blocks = F.pad(documents_BT, (0, -length % BLOCK_TOKENS), value=length + 1).unflatten(1, (-1, BLOCK_TOKENS))
    first_BN, last_BN = blocks[..., 0], blocks[..., -1]
    earlier_NM = documents_BT.new_ones(2 * first_BN.shape[1:], dtype=torch.bool).tril(-1)
    meet_BNM = (last_BN[:, None, :] >= first_BN[:, :, None]) & earlier_NM
    whole_BNM = (first_BN[:, None, :] == last_BN[:, :, None]) & earlier_NM  # one and the same document in both
    itself_NM = torch.eye(len(earlier_NM), dtype=torch.bool, device=documents_BT.device)
    partial = _numbered(meet_BNM & ~whole_BNM | itself_NM)
    return BlockMask.from_kv_blocks(
        *partial, *_numbered(whole_BNM), BLOCK_SIZE=BLOCK_TOKENS, mask_mod=sees, seq_lengths=(length, length)
    )


def _numbered(seen_BNM: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each block sees, ``(B, 1, N)``, and their numbers first, ``(B, 1, N, M)``."""
    order_BNM = seen_BNM.int().argsort(dim=-1, descending=True, stable=True)
    return seen_BNM.sum(-1, dtype=torch.int32)[:, None], order_BNM.int()[:, None]


def attend(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: "Tensor | BlockMask | None", *, dropout: float, gqa: bool
) -> Tensor:
    """Return the attention output ``(B, H, T, K)`` under a mask, by default the causal one."""
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=gqa
        )
    from torch.nn.attention.flex_attention import flex_attention

    # Only compiled it skips blocks. On a CPU it runs uncompiled, for tests; within a compiled block it is compiled.
    attention: Callable[..., Any] = flex_attention
    if q_BHTK.is_cuda and not torch.compiler.is_compiling():
        attention = _compile_once(flex_attention)
    return attention(q_BHTK, k_BGSK, v_BGSK, block_mask=mask, enable_gqa=gqa)
