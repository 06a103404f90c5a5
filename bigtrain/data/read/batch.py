"""What a model receives: tokens in, targets to predict."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""Target that is not counted in the loss; also the default of ``torch.nn.functional.cross_entropy``."""


class ArrayPool:
    """Memory for samples that is used again as soon as nobody holds it.

    To fill fresh memory takes three times as long, for the system has to provide it page by page.
    """

    def __init__(self) -> None:
        """Begin with an empty array, which shows how many references there are to one that nobody holds."""
        self._arrays: list[NDArray[np.int64]] = [np.empty((0, 0), dtype=np.int64)]
        self._idle = self._references(0)

    def take(self, num_samples: int, sequence_length: int) -> NDArray[np.int64]:
        """Return an array ``(num_samples, sequence_length)`` with any content."""
        for i in range(len(self._arrays)):
            length, width = self._arrays[i].shape
            if width == sequence_length and length >= num_samples and self._references(i) == self._idle:
                return self._arrays[i][:num_samples]
        self._arrays = [self._arrays[i] for i in range(len(self._arrays)) if self._references(i) > self._idle]
        self._arrays.append(np.empty((num_samples, sequence_length), dtype=np.int64))
        return self._arrays[-1][:]

    def _references(self, i: int) -> int:
        """Count what holds array ``i``; a tensor or a view is one more than what this class has."""
        return sys.getrefcount(self._arrays[i])

    def samples(self, num_samples: int, sequence_length: int, has_positions: bool) -> "Samples":
        """Return samples that are still to be filled."""
        shape = (num_samples, sequence_length)
        return Samples(self.take(*shape), self.take(*shape), self.take(*shape) if has_positions else None)


@dataclass(slots=True)
class Samples:
    """N samples of T tokens as arrays."""

    tokens: NDArray[np.int64]
    """``(N, T)``."""
    targets: NDArray[np.int64]
    """``(N, T)``: the token after each, or ``IGNORE_INDEX``."""
    positions: NDArray[np.int64] | None = None
    """``(N, T)``, counted from 0 at each document, when attention stays within documents."""

    def put(self, rows: NDArray[np.int64], samples: "Samples") -> None:
        """Take ``samples`` as the rows with these numbers."""
        self.tokens[rows], self.targets[rows] = samples.tokens, samples.targets
        if self.positions is not None:
            self.positions[rows] = samples.positions


def gather_groups(
    groups: NDArray[np.int64], gather: Callable[[int, NDArray[np.int64] | slice], Samples], pool: ArrayPool
) -> Samples:
    """Gather samples that come from several places.

    Args:
        groups: Where each sample comes from, at least one.
        gather: Returns the samples of one group, given its number and the rows that they are for.
        pool: Memory.
    """
    distinct = np.unique(groups).tolist()
    if len(distinct) == 1:
        return gather(distinct[0], slice(None))
    samples = None
    for group in distinct:
        rows = np.flatnonzero(groups == group)
        part = gather(group, rows)
        samples = samples or pool.samples(len(groups), part.tokens.shape[1], part.positions is not None)
        samples.put(rows, part)
    return samples


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples of T tokens."""

    tokens: torch.Tensor
    """int64 ``(B, T)``."""
    targets: torch.Tensor
    """int64 ``(B, T)``: the token after each, or ``IGNORE_INDEX`` where it is not counted."""
    positions: torch.Tensor | None = None
    """int64 ``(B, T)``, counted from 0 at each document, when attention stays within documents; else None."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``; from pinned memory the copy does not block."""
        if self.tokens.device == device:
            return self
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in self._tensors()))

    def split(self, num_samples: int) -> "list[Batch]":
        """Return the samples, so many at a time; they share the memory."""
        parts = (itertools.repeat(None) if t is None else t.split(num_samples) for t in self._tensors())
        return list(itertools.starmap(Batch, zip(*parts, strict=False)))

    def padded(self, num_steps: int, num_samples: int, *, num_kept: int) -> "Batch":
        """Return the samples of several steps, each filled up with samples of which no target counts.

        Args:
            num_steps: Steps that the batch's samples are for, as many for each.
            num_samples: Samples of a step in what is returned.
            num_kept: Samples of a step that are kept, the first ones.
        """
        length = self.tokens.shape[1]
        if num_kept == num_samples:
            return self

        def fill(tensor: torch.Tensor, padding: torch.Tensor | int) -> torch.Tensor:
            whole = tensor.new_empty(num_steps, num_samples, length)
            whole[:, :num_kept] = tensor.view(num_steps, -1, length)[:, :num_kept]
            whole[:, num_kept:] = padding
            return whole.view(-1, length)

        positions = None if self.positions is None else fill(self.positions, torch.arange(length))
        return Batch(fill(self.tokens, 0), fill(self.targets, IGNORE_INDEX), positions)

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked host memory."""
        return Batch(*(t if t is None else t.pin_memory() for t in self._tensors()))

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.tokens, self.targets, self.positions


def build_batch(samples: Samples) -> Batch:
    """Return samples as tensors that share their memory."""
    arrays = samples.tokens, samples.targets, samples.positions
    return Batch(*(array if array is None else torch.from_numpy(array) for array in arrays))
