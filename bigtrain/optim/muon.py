"""Muon for the hidden matrices, AdamW for everything else, under any sharding.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the
orthogonal matrix nearest to it: U V^T for a momentum U S V^T. That needs the whole matrix, of which a rank may hold a
part. So every matrix has an owner among the ranks that share the state. A rank keeps the momentum of its part, sends
its part of the update to the owner, which orthogonalises it, and gets its part of the result. Where every rank
holds everything (DDP) the owners divide the work. A few matrices are under way at a time.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.distributed.collectives import local_part

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
EPS = 1e-7
IN_FLIGHT_ELEMENTS = 1 << 24  # of matrices that one owner orthogonalises at a time, if not of one


class Rectangle(NamedTuple):
    """Consecutive rows and columns of a matrix."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def of(self, matrix: Tensor) -> Tensor:
        """Return the view of it in a whole matrix ``(rows, columns)``."""
        return matrix[self.row : self.row + self.rows, self.column : self.column + self.columns]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A hidden matrix, and where this rank's part of it is: some rectangles."""

    rows: int
    columns: int
    holder: Tensor  # parameter of the optimizer in whose memory the part is
    begin: int  # where the part begins in that memory; its rectangles lie there one after the other
    rectangles: tuple[tuple[Rectangle, ...], ...]  # of each rank: its part, or on all the whole matrix

    def part(self, tensor: Tensor, rank: int) -> Tensor:
        """Return the part that ``rank``, which is this one, holds in ``tensor``, the holder or one like it; flat."""
        return local_part(tensor).view(-1)[self.begin : self.begin + self.numel_of(rank)]

    def numel_of(self, rank: int) -> int:
        """Return the number of elements that ``rank`` holds."""
        return sum(rectangle.numel for rectangle in self.rectangles[rank])

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of it."""
        return self.rectangles[0] == self.rectangles[-1] == (Rectangle(0, 0, self.rows, self.columns),)

    @property
    def lr_factor(self) -> float:
        """What gives the update the size of AdamW's, so that one learning rate serves both.

        An orthogonal matrix has a root mean square of 1 / sqrt(max(rows, columns)), AdamW's update one of about 0.2
        (Liu et al. 2025, arXiv 2502.16982, section 2.2; torch calls it ``match_rms_adamw``).
        """
        return 0.2 * math.sqrt(max(self.rows, self.columns))

    @property
    def cost(self) -> int:
        """In proportion to the operations of :func:`newton_schulz`."""
        return min(self.rows, self.columns) ** 2 * (2 * max(self.rows, self.columns) + min(self.rows, self.columns))


def is_hidden_matrix(name: str, num_dims: int) -> bool:
    """Return whether Muon is for the parameter of this name in the network: a matrix in a numbered block, hence no embedding and no head.

    Experts ``(E, rows, columns)`` are E matrices; a router, whose rows are directions of choices, is like a head.
    """
    if num_dims == 3:
        return re.search(r"\.\d+\..*experts\.\w+$", name) is not None
    return num_dims == 2 and re.search(r"\.\d+\.(?!.*router).*weight$", name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Who orthogonalises matrices, and how."""

    device: torch.device  # where it is done, and between which devices matrices travel
    dtype: torch.dtype  # in which it is done, and in which they travel
    rank: int = 0  # of this process, among those that share the state
    num_ranks: int = 1  # number of these, each of which is an owner
    group: dist.ProcessGroup | None = None  # of them; None is the default group


class Muon(torch.optim.AdamW):
    """Muon for groups with ``muon=True`` (as torch's with ``adjust_lr_fn="match_rms_adamw"``), AdamW for the others."""

    matrices: dict[Tensor, list[Matrix]]  # by parameter of a group with ``muon=True``; set by the engine
    workshop: Workshop  # set by the engine

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters; a step of all ranks together."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_muon(group)
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        bad = getattr(self, "found_inf", None)  # set where only the device knows whether the gradient is finite
        keep = 1.0 if bad is None else (1.0 - bad).to(parameters[0].device)
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            gradient, momentum = local_part(p.grad), local_part(self.state[p]["momentum_buffer"])
            if bad is not None:
                gradient.masked_fill_(bad.to(gradient.device) != 0, 0.0)
            momentum.lerp_(gradient, (1 - MOMENTUM) * keep)
            gradient.lerp_(momentum, MOMENTUM)  # Nesterov: the momentum after another such gradient
        if not group["lr"]:  # as when an engine has the state created, before it knows of matrices
            return
        for p in parameters:
            local_part(p).mul_(1 - group["lr"] * group["weight_decay"] * keep)
        rank = self.workshop.rank
        matrices = [matrix for p in parameters for matrix in self.matrices[p]]
        for some in rounds(matrices, self.workshop.num_ranks):
            updates = orthogonalise_parts(some, [m.part(m.holder.grad, rank) for m in some], self.workshop)
            for m, update in zip(some, updates, strict=True):
                weight = m.part(m.holder, rank)
                weight.sub_(update.to(weight.device, weight.dtype).mul_(group["lr"] * m.lr_factor * keep))


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return orthogonal matrices near ``matrices`` ``(N, rows, columns)``, rows <= columns; singular values 0.7 to 1.2.

    Five steps of a quintic iteration with Jordan's coefficients, which are steep at 0 and do not converge to 1.
    """
    a, b, c = COEFFICIENTS
    x = matrices / torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def rounds(matrices: list[Matrix], num_owners: int) -> Iterator[list[Matrix]]:
    """Yield the matrices in rounds, those of about the same cost together; in each, i is owned by i % owners."""
    left = sorted(matrices, key=lambda m: m.cost, reverse=True)
    while left:
        each = max(1, IN_FLIGHT_ELEMENTS // (left[0].rows * left[0].columns))
        yield left[: each * num_owners]
        left = left[each * num_owners :]


def orthogonalise_parts(matrices: list[Matrix], parts: list[Tensor], at: Workshop) -> list[Tensor]:
    """Return the flat parts ``parts`` of this rank of a round's matrices, orthogonalised; all ranks call this."""
    n = at.num_ranks
    owned = matrices[at.rank :: n]
    results = _orthogonalise(owned, _gather(matrices, parts, at))
    if n == 1:
        return results
    numels = [[m.numel_of(at.rank) for m in matrices[r::n]] for r in range(n)]
    if matrices[0].is_whole:
        pieces = _broadcast(results, numels, at)
    else:
        wholes = [(m, x.view(m.rows, m.columns)) for m, x in zip(owned, results, strict=True)]
        cut = [[part.of(x).flatten() for m, x in wholes for part in m.rectangles[r]] for r in range(n)]
        pieces = _swap(cut, numels, at)
    return [pieces[i % n][i // n] for i in range(len(matrices))]


def _gather(matrices: list[Matrix], parts: list[Tensor], at: Workshop) -> list[Tensor]:
    """Return the matrices of the round that this rank owns, whole and flat."""
    n = at.num_ranks
    if matrices[0].is_whole:
        return [whole.to(at.device, at.dtype) for whole in parts[at.rank :: n]]
    travelling = [part.to(at.device, at.dtype) for part in parts]
    numels = [[m.numel_of(r) for m in matrices[at.rank :: n]] for r in range(n)]
    pieces = _swap([travelling[r::n] for r in range(n)], numels, at)
    owned = matrices[at.rank :: n]
    return [_put_together(m, of_ranks) for m, of_ranks in zip(owned, zip(*pieces, strict=True), strict=True)]


def _put_together(matrix: Matrix, parts: tuple[Tensor, ...]) -> Tensor:
    """Return a matrix, flat, from the flat part of each rank."""
    whole = parts[0].new_empty(matrix.rows, matrix.columns)
    for own, part in zip(matrix.rectangles, parts, strict=True):
        for rectangle, piece in zip(own, part.split([rectangle.numel for rectangle in own]), strict=True):
            rectangle.of(whole).copy_(piece.view(rectangle.rows, rectangle.columns))
    return whole.view(-1)


def _orthogonalise(matrices: list[Matrix], wholes: list[Tensor]) -> list[Tensor]:
    """Return the flat results; those of one shape, lying or standing, are computed as one batch."""
    results = []
    pairs = zip(matrices, wholes, strict=True)
    for _, batch in itertools.groupby(pairs, key=lambda pair: sorted((pair[0].rows, pair[0].columns))):
        own = [(m, whole.view(m.rows, m.columns)) for m, whole in batch]
        lying = newton_schulz(torch.stack([x if m.rows <= m.columns else x.mT for m, x in own]))
        results += [(x if m.rows <= m.columns else x.mT).flatten() for (m, _), x in zip(own, lying, strict=True)]
    return results


def _broadcast(own: list[Tensor], numels: list[list[int]], at: Workshop) -> list[list[Tensor]]:
    """Send the flat tensors ``own`` to all ranks; return what each rank sent, whose sizes are ``numels[r]``."""
    of_ranks = []
    for r, sizes in enumerate(numels):
        everything = torch.empty(sum(sizes), device=at.device, dtype=at.dtype)
        if sizes:
            if r == at.rank:
                torch.cat(own, out=everything)
            dist.broadcast(everything, group=at.group, group_src=r)
        of_ranks.append(list(everything.split(sizes)))
    return of_ranks


def _swap(outgoing: list[list[Tensor]], numels: list[list[int]], at: Workshop) -> list[list[Tensor]]:
    """Send the flat tensors ``outgoing[r]`` to each rank r; return what each sent, whose sizes are ``numels[r]``."""
    nothing = torch.empty(0, device=at.device, dtype=at.dtype)
    sent = torch.cat([nothing, *(tensor for row in outgoing for tensor in row)])
    sizes = [sum(tensor.numel() for tensor in row) for row in outgoing]
    received = torch.empty(sum(map(sum, numels)), device=at.device, dtype=at.dtype)
    dist.all_to_all_single(received, sent, [sum(row) for row in numels], sizes, group=at.group)
    pieces = iter(received.split([numel for row in numels for numel in row]))
    return [[next(pieces) for _ in row] for row in numels]
