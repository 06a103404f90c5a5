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


def build_document_mask(positions_BS: Tensor, *, flex: bool, rows: Tensor | None = None) -> "Tensor | BlockMask":
    """Return a causal mask within documents, bool ``(B, 1, T, S)`` or a ``BlockMask``; positions begin at 0 in each.

    The queries are those at the places ``rows`` ``(T,)``, ascending, by default all.
    """
    documents_BS = (positions_BS == 0).cumsum(dim=1)
    if flex:
        return _block_mask(documents_BS, rows)
    if rows is None:
        return (documents_BS[:, :, None] == documents_BS[:, None, :]).tril()[:, None]
    is_earlier_TS = rows[:, None] >= torch.arange(documents_BS.shape[1], device=rows.device)
    return ((documents_BS[:, rows, None] == documents_BS[:, None, :]) & is_earlier_TS)[:, None]


def _block_mask(documents_BS: Tensor, rows: Tensor | None) -> "BlockMask":
    """Build the block mask from the first and last document of each block, without a T x S matrix."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b: Tensor, _h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        place = t if rows is None else rows[t]
        return (documents_BS[b, place] == documents_BS[b, s]) & (place >= s)

    length = documents_BS.shape[1]
    places_T = torch.arange(length, device=documents_BS.device) if rows is None else rows
    # Padding of the last block is a document of its own, later than all others.
    first_BM, last_BM = _ends(documents_BS, padding=length + 1)
    low_BN, high_BN = (ends[..., None] for ends in _ends(documents_BS[:, places_T], padding=length + 1))
    begin_N, end_N = (ends[..., None] for ends in _ends(places_T, padding=length - 1))
    starts_M = torch.arange(first_BM.shape[1], device=documents_BS.device) * BLOCK_TOKENS
    meet_BNM = (last_BM[:, None] >= low_BN) & (first_BM[:, None] <= high_BN) & (starts_M <= end_N)
    # One and the same document in both blocks, and all queries are later than all keys.
    whole_BNM = (first_BM[:, None] == high_BN) & (last_BM[:, None] == low_BN) & (starts_M + BLOCK_TOKENS <= begin_N)
    partial = _numbered(meet_BNM & ~whole_BNM)
    return BlockMask.from_kv_blocks(
        *partial, *_numbered(whole_BNM), BLOCK_SIZE=BLOCK_TOKENS, mask_mod=sees, seq_lengths=(len(places_T), length)
    )


def _ends(ascending: Tensor, *, padding: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last number of each block ``(..., N)``."""
    blocks = F.pad(ascending, (0, -ascending.shape[-1] % BLOCK_TOKENS), value=padding).unflatten(-1, (-1, BLOCK_TOKENS))
    return blocks[..., 0], blocks[..., -1]


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
