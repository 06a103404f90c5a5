"""The collectives between ranks that share matrices, with their gradients.

Parameters are plain local tensors: an all-gather in the forward pass is a reduce-scatter in the backward pass, and the
other way around.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.models.exchange import Exchange, ExpertExchange

# torch 2.13 has deprecated the names of 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TensorExchange(Exchange):
    """The ranks of a group share the matrices."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def own(self, x_BT: Tensor) -> Tensor:
        return x_BT.chunk(self.size, dim=-1)[self.rank]

    def spread(self, x_BTD: Tensor) -> Tensor:
        return spread(x_BTD, self.group, self.size)

    def collect(self, x_BTD: Tensor) -> Tensor:
        return _Collect.apply(x_BTD, self.group, self.size)

    def maximum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x


def spread(x_BTD: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """Return the tokens of all ranks; their gradients are summed, and each rank gets its part."""
    return _Spread.apply(x_BTD, group, size)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
        ctx.ranks = group, size
        return gather_tokens(x_BTD, group, size)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None]:
        return scatter_tokens(grad_BTD, *ctx.ranks), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
        ctx.ranks = group, size
        return scatter_tokens(x_BTD, group, size)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None]:
        return gather_tokens(grad_BTD, *ctx.ranks), None, None


def gather_tokens(x_BTD: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """Return the tokens of all ranks, one rank's behind the other's."""
    part_TBD = x_BTD.transpose(0, 1).contiguous()
    whole_TBD = part_TBD.new_empty((size * part_TBD.shape[0], *part_TBD.shape[1:]))
    _all_gather(whole_TBD, part_TBD, group=group)
    return whole_TBD.transpose(0, 1).contiguous()


def scatter_tokens(x_BTD: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    """Return the sum over all ranks of this rank's part of the tokens."""
    whole_TBD = x_BTD.transpose(0, 1).contiguous()
    part_TBD = whole_TBD.new_empty((whole_TBD.shape[0] // size, *whole_TBD.shape[1:]))
    _reduce_scatter(part_TBD, whole_TBD, group=group)
    return part_TBD.transpose(0, 1).contiguous()


def add_up(parts: Iterable[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    """Sum tensors, alike on the ranks of a group, over it, in place and in one all-reduce on ``device``."""
    parts = [part for part in parts if part.numel()]
    if not parts:
        return
    flat = torch.cat([part.reshape(-1) for part in parts]).to(device)  # offloaded gradients are on the host
    dist.all_reduce(flat, group=group)
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))


class TokenExchange(ExpertExchange):
    """The ranks of a group have some experts each, and send each other tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def to_experts(self, rows: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        sent = counts_E.view(self.size, -1)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.group)
        num_sent, num_got = sent.sum(1).tolist(), got.sum(1).tolist()  # on a GPU the host waits here
        rows = _Travel.apply(rows, num_got, num_sent, self.group)
        # They lie by sender, and those of a sender by expert.
        experts = torch.arange(got.shape[1], device=got.device).repeat(self.size).repeat_interleave(got.flatten())
        order = experts.argsort(stable=True)
        return rows[order], got.sum(0), (order, num_got, num_sent)

    def back(self, rows: Tensor, way: Any) -> Tensor:
        order, num_got, num_sent = way
        rows = torch.empty_like(rows).index_copy(0, order, rows)
        return _Travel.apply(rows, num_sent, num_got, self.group)


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_got: list[int], num_sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = num_got, num_sent, group
        return _travel(rows, num_got, num_sent, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        num_got, num_sent, group = ctx.way
        return _travel(gradient, num_sent, num_got, group), None, None, None


def _travel(rows: Tensor, num_got: list[int], num_sent: list[int], group: dist.ProcessGroup) -> Tensor:
    found = rows.new_empty((sum(num_got), *rows.shape[1:]))
    dist.all_to_all_single(found, rows.contiguous(), num_got, num_sent, group=group)
    return found
