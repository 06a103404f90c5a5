"""The collectives between ranks that share sequences, with their gradients.

``gather``: a rank has queries of some tokens and the keys and values of all (Grattafiori et al. 2024, arXiv 2407.21783,
section 3.3.2). Early tokens see few others, so each rank has a run of tokens from the beginning and its mirror image from
the end. ``ulysses``: for attention ranks change their tokens for heads (Jacobs et al. 2023, arXiv 2309.14509).
"""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.config import CpMethod
from bigtrain.engine.exchange import spread
from bigtrain.models.exchange import Context


class Gather(Context):
    """The ranks of a group have some of the queries each, and all keys and values."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, rank = dist.get_world_size(group), dist.get_rank(group)
        runs = [self._runs(other) for other in range(self.size)]
        self.runs = runs[rank]  # of the tokens, that this rank has
        of_all = [*itertools.chain.from_iterable(runs)]
        self.num_runs = len(of_all)
        self.in_order = [of_all.index(run) for run in range(self.num_runs)]  # of what is gathered

    def _runs(self, rank: int) -> tuple[int, ...]:
        return rank, 2 * self.size - 1 - rank

    def own(self, x_BT: Tensor) -> Tensor:
        assert x_BT.shape[-1] % self.num_runs == 0, f"{x_BT.shape[-1]} tokens in {self.num_runs} runs"
        runs = x_BT.chunk(self.num_runs, dim=-1)
        return torch.cat([runs[run] for run in self.runs], dim=-1)

    def whole(self, x_BTD: Tensor) -> Tensor:
        runs = spread(x_BTD, self.group, self.size).chunk(self.num_runs, dim=1)
        return torch.cat([runs[place] for place in self.in_order], dim=1)

    def mask_rows(self, num_tokens: int, device: torch.device) -> Tensor | None:
        return self.own(torch.arange(num_tokens, device=device))

    def to_attention(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_BSGK, v_BSGK = self.whole(torch.cat([k_BTGK, v_BTGK], dim=2)).chunk(2, dim=2)
        return q_BTHK, k_BSGK, v_BSGK


class Ulysses(Gather):
    """The ranks of a group attend with some of the heads each, to all tokens."""

    def _runs(self, rank: int) -> tuple[int, ...]:
        return (rank,)

    def mask_rows(self, num_tokens: int, device: torch.device) -> Tensor | None:
        return None

    def to_attention(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if (num_kv_heads := k_BTGK.shape[2]) < self.size:  # the same one for several ranks
            k_BTGK, v_BTGK = (x.repeat_interleave(self.size // num_kv_heads, dim=2) for x in (k_BTGK, v_BTGK))
        heads = [x.unflatten(2, (self.size, -1)) for x in (q_BTHK, k_BTGK, v_BTGK)]
        sizes = [x.shape[3] for x in heads]
        return _ToHeads.apply(torch.cat(heads, dim=3), self.group).split(sizes, dim=2)

    def from_attention(self, y_BTHK: Tensor) -> Tensor:
        return _ToTokens.apply(y_BTHK, self.group).flatten(2, 3)


CONTEXTS = {CpMethod.gather: Gather, CpMethod.ulysses: Ulysses}


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTRXK: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return to_heads(x_BTRXK, group)

    @staticmethod
    def backward(ctx: Any, grad_BSXK: Tensor) -> tuple[Tensor, None]:
        return to_tokens(grad_BSXK, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSXK: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return to_tokens(x_BSXK, group)

    @staticmethod
    def backward(ctx: Any, grad_BTRXK: Tensor) -> tuple[Tensor, None]:
        return to_heads(grad_BTRXK, ctx.group), None


def to_heads(x_BTRXK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's heads of all tokens ``(B, S, X, K)``, from the heads for each rank R of its tokens."""
    sent = x_BTRXK.movedim(2, 0).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, 1).flatten(1, 2)


def to_tokens(x_BSXK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Do the reverse: return the heads of each rank R of this rank's tokens, ``(B, T, R, X, K)``."""
    sent = x_BSXK.unflatten(1, (dist.get_world_size(group), -1)).movedim(1, 0).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, 2)
