"""The training state without the engine: named tensors in natural shape, as boxes.

Every engine keeps a different piece of each tensor on each rank: all of it (DDP), some rows (FSDP2) or a flat range
that starts and ends anywhere (ZeRO). All of these are a few N-dimensional boxes of the whole tensor. Initialisation and
checkpoints fill and read boxes and never ask which engine they belong to.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from bigtrain.models.init import InitialValue
from bigtrain.models.partition import Cut


@dataclass(frozen=True, slots=True)
class Box:
    """An N-dimensional piece of a tensor: some indices of each dimension, one after the other."""

    offsets: tuple[int, ...]  # where the piece begins in the whole tensor
    view: torch.Tensor  # writable view of the engine's memory; its shape is the size of the piece


@dataclass(frozen=True, slots=True)
class Entry:
    """What this rank holds of one tensor of the state."""

    shape: tuple[int, ...]  # shape of the whole tensor
    dtype: torch.dtype  # type of the elements
    boxes: tuple[Box, ...]  # the pieces on this rank; empty if it holds nothing
    replica: int = 0  # which of the ``num_replicas`` ranks with the same boxes this is
    num_replicas: int = 1  # how many ranks hold the same boxes

    def own_boxes(self) -> tuple[Box, ...]:
        """Return this replica's share of the boxes: the shares of all replicas are disjoint and complete."""
        if self.num_replicas == 1:
            return self.boxes
        return tuple(piece for box in self.boxes for piece in _share(box, self.replica, self.num_replicas))


class EngineState(Protocol):
    """The state of a training run as one engine holds it on this rank."""

    entries: dict[str, Entry]  # ``model.<name>`` (fp32 masters), ``optim.state.<name>.<key>``; keys alike on all ranks
    holders: dict[str, torch.Tensor]
    """By name of each trained parameter the optimizer's parameter, which may hold others too, in whose memory the boxes
    of ``model.<name>`` lie, one after the other."""
    cuts: dict[str, Cut]
    """By name of each parameter whose matrix ranks share, which part this rank has."""

    def commit(self) -> None:
        """Take over values that were written into the boxes (refresh low-precision and gathered copies)."""

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and this rank's part of the gradient of every parameter that has one here.

        Only between the last micro-batch of a step and the update; the part can be written. Ranks with the same boxes of ``model.<name>``
        have the same part; together the parts are the whole gradient, in no particular shape.
        """


def whole_entry(tensor: torch.Tensor, *, replica: int = 0, num_replicas: int = 1) -> Entry:
    """Return the entry of a tensor that this rank holds whole."""
    shape = tuple(tensor.shape)
    return Entry(shape, tensor.dtype, (Box((0,) * len(shape), tensor.detach()),), replica, num_replicas)


def in_whole(entry: Entry, cut: Cut | None, *, rank: int, size: int) -> Entry:
    """Return the entry of a tensor as one of the whole tensor, of which rank ``rank`` of ``size`` has the part ``cut``.

    Without a cut all these ranks have the same.
    """
    if cut is None:
        replicas = entry.replica * size + rank, entry.num_replicas * size
        return dataclasses.replace(entry, replica=replicas[0], num_replicas=replicas[1])
    boxes = tuple(piece for box in entry.boxes for piece in _place(box, cut))
    return dataclasses.replace(entry, shape=cut.whole(entry.shape), boxes=boxes)


def _place(box: Box, cut: Cut) -> Iterator[Box]:
    """Yield a box of a rank's part as boxes of the whole tensor, one for each run of indices that it meets."""
    begin, first = box.offsets[cut.dim], 0
    stop = begin + box.view.shape[cut.dim]
    for run in cut.runs:
        low, high = max(begin, first), min(stop, first + len(run))
        if low < high:
            offsets = (*box.offsets[: cut.dim], run.start + low - first, *box.offsets[cut.dim + 1 :])
            yield Box(offsets, box.view.narrow(cut.dim, low - begin, high - low))
        first += len(run)


_CHUNK_ELEMENTS = 2**22  # of rows that are made at a time where a box holds a part of each
MODEL = "model."
OPTIMIZER = "optim.state."
AVERAGE = "average"  # key in the optimizer's state of a moving average of a weight, which begins at 0


def flat_boxes(shape: tuple[int, ...], start: int, flat: torch.Tensor) -> tuple[Box, ...]:
    """Cut a flat range, from element ``start`` of ``shape`` on, into at most ``2 * len(shape) - 1`` boxes, its views."""
    return tuple(_cut(shape, start, flat))


def _cut(shape: tuple[int, ...], start: int, flat: torch.Tensor) -> Iterator[Box]:
    if flat.numel() == 0:
        return
    if len(shape) <= 1:
        yield Box((start,) if shape else (), flat.view(flat.shape if shape else ()))
        return
    row_numel = math.prod(shape[1:])
    row, within = divmod(start, row_numel)
    if within or flat.numel() < row_numel:  # the rest of a row that began earlier, or a part of one row
        count = min(row_numel - within, flat.numel())
        for box in _cut(shape[1:], within, flat[:count]):
            yield Box((row, *box.offsets), box.view.unsqueeze(0))
        yield from _cut(shape, start + count, flat[count:])
        return
    num_rows = flat.numel() // row_numel
    count = num_rows * row_numel
    yield Box((row, *(0 for _ in shape[1:])), flat[:count].view(num_rows, *shape[1:]))
    yield from _cut(shape, start + count, flat[count:])


def _share(box: Box, replica: int, num_replicas: int) -> Iterator[Box]:
    """Cut the flat range of a replicated box into equal shares and yield the boxes of one."""
    flat, shape = box.view.reshape(-1), tuple(box.view.shape)
    bounds = [flat.numel() * r // num_replicas for r in (replica, replica + 1)]
    for piece in _cut(shape, bounds[0], flat[bounds[0] : bounds[1]]):
        yield Box(tuple(a + b for a, b in zip(box.offsets, piece.offsets, strict=True)), piece.view)


def initialise(state: EngineState, values: Mapping[str, InitialValue], *, num_threads: int) -> None:
    """Fill the master weights on this rank with their initial values and zero the optimizer state."""
    weights = {key: entry for key, entry in state.entries.items() if key.startswith(MODEL)}
    fill_weights(weights, values, num_threads=num_threads)
    clear_optimizer(state)
    state.commit()


def fill_weights(entries: Mapping[str, Entry], values: Mapping[str, InitialValue], *, num_threads: int = 1) -> None:
    """Fill weights on this rank, entries of ``model.<name>``, with their initial values."""

    def fill(key: str) -> None:
        for box in entries[key].boxes:
            fill_box(values[key.removeprefix(MODEL)], entries[key].shape, box.offsets, box.view)

    with ThreadPoolExecutor(num_threads) as pool, torch.no_grad():
        list(pool.map(fill, entries))


def fill_box(
    value: InitialValue, shape: tuple[int, ...], offsets: tuple[int, ...], out: torch.Tensor, *, start: int = 0
) -> None:
    """Write the part of a parameter's initial value that a box of memory ``out`` at ``offsets`` in ``shape`` holds.

    ``shape`` is that of the whole parameter or of a part of it that is contiguous and begins at the element ``start``.
    """
    if not shape:
        buffer = torch.empty(1, dtype=torch.float32)
        value.fill(start, buffer)
        out.copy_(buffer[0])
        return
    row_numel, has_whole_rows = math.prod(shape[1:]), out.shape[1:] == shape[1:]
    if not has_whole_rows and (len(out) == 1 or row_numel > _CHUNK_ELEMENTS):
        for i, row in enumerate(out, start=offsets[0]):
            fill_box(value, shape[1:], offsets[1:], row, start=start + i * row_numel)
        return
    # Of a box of columns, rows are made whole and many at a time: one by one would make each block of numbers anew.
    inside = (slice(None), *(slice(o, o + n) for o, n in zip(offsets[1:], out.shape[1:], strict=True)))
    first = offsets[0]
    for rows in out.split(len(out) if has_whole_rows else max(_CHUNK_ELEMENTS // row_numel, 1)):
        buffer = torch.empty(len(rows) * row_numel, dtype=torch.float32)
        value.fill(start + first * row_numel, buffer)
        rows.copy_(buffer.view(len(rows), *shape[1:])[inside])
        first += len(rows)


def clear_optimizer(state: EngineState) -> None:
    """Zero the optimizer state on this rank, as it is before the first step."""
    for key, entry in state.entries.items():
        if key.startswith(OPTIMIZER):
            for box in entry.boxes:
                box.view.zero_()


def add_averages(state: EngineState) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Add a moving average of each trained weight to the optimizer's state; return this rank's pieces, and the weights'."""
    pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name in state.holders:
        entry = state.entries[MODEL + name]
        boxes = tuple(Box(box.offsets, torch.zeros_like(box.view)) for box in entry.boxes)
        pieces += [(own.view, box.view) for own, box in zip(boxes, entry.boxes, strict=True)]
        state.entries[f"{OPTIMIZER}{name}.{AVERAGE}"] = dataclasses.replace(entry, boxes=boxes)
    return [average for average, _ in pieces], [weight for _, weight in pieces]


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer create its per-parameter state, which torch optimizers do in their first step.

    A step with zero gradients (those that exist are zero) and a learning rate of 0 changes no weight; step counters
    are set back to 0. So the state always exists, whatever the update rule, before anything is loaded.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
