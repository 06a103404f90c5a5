"""Which rectangles of which matrices lie in the memory of the optimizer's parameters: what Muon is told by an engine."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from bigtrain.distributed.collectives import local_part
from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL, Box
from bigtrain.errors import ConfigError
from bigtrain.optim.muon import Matrix, Muon, Rectangle, Workshop, is_hidden_matrix
from bigtrain.tasks.base import canonical_name

MOST_RECTANGLES = 3  # of a rank: the end of a row, whole rows, part of a row of a flat range


def hand_over_matrices(engine: Engine, ranks: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
    """Tell the engine's optimizer, which is Muon, what it holds; ConfigError: the model has no such matrices.

    All ranks call this. ``ranks`` are those that share the state or, where it is replicated, the work, by default all;
    matrices are orthogonalised in ``dtype``.
    """
    optimizer, state = engine.optimizer, engine.state
    assert isinstance(optimizer, Muon)
    fused = {
        canonical_name(f"{name}.weight"): rows
        for name, module in engine.module.named_modules()
        if (rows := getattr(module, "fused_rows", ()))
    }
    found = []
    for name, holder in state.holders.items():
        entry = state.entries[MODEL + name]
        if is_hidden_matrix(name, len(entry.shape)):
            rows = fused.get(name, entry.shape[-2:-1] * (entry.shape[0] if len(entry.shape) == 3 else 1))
            boxes = [_of_rows(box, entry.shape) for box in entry.boxes]
            found += [(holder, entry.shape[-1], *part) for part in _parts(holder, boxes, rows)]
    if not found:
        raise ConfigError("optimizer=muon is for the matrices of numbered blocks, and this model has none: use adamw")
    own = torch.zeros(len(found), MOST_RECTANGLES, len(Rectangle._fields), dtype=torch.int64)
    for numbers, (*_, rectangles) in zip(own, found, strict=True):
        for row, rectangle in zip(numbers, rectangles, strict=False):
            row.copy_(torch.tensor(rectangle))
    num_ranks, own = dist.get_world_size(ranks), own.to(engine.device)
    of_ranks = own.new_empty(num_ranks, *own.shape)
    dist.all_gather(list(of_ranks), own, group=ranks)
    optimizer.workshop = Workshop(
        device=engine.device, dtype=dtype, rank=dist.get_rank(ranks), num_ranks=num_ranks, group=ranks
    )
    optimizer.matrices = {}
    for (holder, columns, rows, begin, _), numbers in zip(found, of_ranks.transpose(0, 1).tolist(), strict=True):
        parts = tuple(tuple(Rectangle(*four) for four in rank if four[2]) for rank in numbers)
        matrix = Matrix(rows, columns, holder, begin, parts)
        assert matrix.is_whole or sum(map(matrix.numel_of, range(num_ranks))) == rows * columns, matrix
        optimizer.matrices.setdefault(holder, []).append(matrix)


def _of_rows(box: Box, shape: tuple[int, ...]) -> Box:
    """Return a box of matrices side by side as one of the rows of all of them, one matrix below the other."""
    if len(shape) == 2:
        return box
    first, row, column = box.offsets
    assert len(box.view) == 1 or box.view.shape[1] == shape[1], "several matrices are held whole"
    return Box((first * shape[1] + row, column), box.view.flatten(0, 1))


def _parts(
    holder: torch.Tensor, boxes: Sequence[Box], fused_rows: tuple[int, ...]
) -> Iterator[tuple[int, int, list[Rectangle]]]:
    """Yield what ``boxes`` hold of each matrix that a parameter consists of: its rows, where that begins, rectangles."""
    first = 0
    for count in fused_rows:
        begin, rectangles = 0, list[Rectangle]()
        for box in boxes:
            (row, column), (num_rows, num_columns) = box.offsets, box.view.shape
            low, high = max(row, first), min(row + num_rows, first + count)
            if low < high:
                if not rectangles:
                    within = int(box.view.storage_offset() - local_part(holder).storage_offset())
                    begin = within + (low - row) * num_columns
                rectangles.append(Rectangle(low - first, column, high - low, num_columns))
        yield count, begin, rectangles
        first += count
