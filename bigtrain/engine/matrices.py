"""Which matrices lie where in the memory of which parameter: the one thing that Muon has to be told by an engine."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL, Place, canonical_name
from bigtrain.errors import ConfigError
from bigtrain.optim.muon import Matrix, Muon, Workshop, is_hidden_matrix


class _Part(NamedTuple):
    """This rank's part of a matrix."""

    place: Place
    rows: int
    columns: int
    start: int
    """First element, in the matrix."""
    numel: int
    begin: int
    """First element, in the holder's memory."""


def hand_over_matrices(engine: Engine, ranks: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
    """Tell the engine's optimizer, which is Muon, what it holds; all ranks call this.

    Args:
        engine: with its optimizer state in place.
        ranks: those that share the state or, where it is replicated, the work; None = all.
        dtype: in which matrices are orthogonalised.

    Raises:
        ConfigError: the model has no such matrices.
    """
    optimizer, state = engine.optimizer, engine.state
    assert isinstance(optimizer, Muon)
    fused = {
        canonical_name(f"{name}.weight"): rows
        for name, module in engine.module.named_modules()
        if (rows := getattr(module, "fused_rows", ()))
    }
    parts = []
    for name, place in state.places.items():
        shape = state.entries[MODEL + name].shape
        if is_hidden_matrix(name, len(shape)):
            parts += _parts(place, fused.get(name, shape[:1]), shape[1])
    if not parts:
        raise ConfigError("optimizer=muon is for the matrices of numbered blocks, and this model has none: use adamw")
    rank, num_ranks = dist.get_rank(ranks), dist.get_world_size(ranks)
    own = torch.tensor([[part.start, part.numel] for part in parts], device=engine.device)
    of_ranks = own.new_empty(num_ranks, *own.shape)
    dist.all_gather(list(of_ranks), own, group=ranks)
    optimizer.workshop = Workshop(device=engine.device, dtype=dtype, rank=rank, num_ranks=num_ranks, group=ranks)
    optimizer.matrices = {}
    for part, ranges in zip(parts, of_ranks.unbind(1), strict=True):
        starts, numels = map(tuple, ranges.T.tolist())
        matrix = Matrix(part.rows, part.columns, part.place.holder, part.begin, numels)
        in_order = itertools.accumulate(numels, initial=0)
        is_tiled = all(n == 0 or a == b for a, n, b in zip(starts, numels, in_order, strict=False))
        assert matrix.is_whole or (is_tiled and sum(numels) == part.rows * part.columns), (part, starts, numels)
        optimizer.matrices.setdefault(matrix.holder, []).append(matrix)


def _parts(place: Place, rows: tuple[int, ...], columns: int) -> Iterator[_Part]:
    """Yield what lies at ``place`` of the matrices with so many ``rows`` that a parameter consists of."""
    first = 0
    for count in rows:
        end = first + count * columns
        low = min(max(place.start, first), end)
        high = max(min(place.start + place.numel, end), low)
        yield _Part(place, count, columns, low - first, high - low, place.begin + low - place.start)
        first = end
