"""Samples and batches: named tensors whose first dimension are the samples."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Samples(dict[str, NDArray[Any]]):
    """N samples: an array ``(N, ...)`` by name, in the order in which a network gets them."""


class Collation(NamedTuple):
    """What a task does to samples, a pure function of them and their positions in the run, int64 ``(N,)``."""

    apply: Callable[[Samples, NDArray[np.int64]], Samples]
    told: str  # what decides it, for the digest of the data


class ArrayPool:
    """Memory for samples, used again when nobody holds it; fresh memory, provided page by page, takes 3x as long."""

    def __init__(self) -> None:
        """Begin with an empty array, which shows how many references there are to one that nobody holds."""
        self._arrays: list[NDArray[Any]] = [np.empty(0, dtype=np.bool_)]
        self._idle = self._references(0)

    def take(self, num_samples: int, *shape: int, dtype: Any = np.int64) -> NDArray[Any]:
        for i in range(len(self._arrays)):
            if self._is_like(i, shape, dtype) and len(self._arrays[i]) >= num_samples and self._is_idle(i):
                return self._arrays[i][:num_samples]
        kept = [i for i in range(len(self._arrays)) if not (self._is_like(i, shape, dtype) and self._is_idle(i))]
        self._arrays = [self._arrays[i] for i in kept]
        self._arrays.append(np.empty((num_samples, *shape), dtype=dtype))
        return self._arrays[-1][:]

    def _is_like(self, i: int, shape: tuple[int, ...], dtype: Any) -> bool:
        return self._arrays[i].shape[1:] == shape and self._arrays[i].dtype == dtype

    def _is_idle(self, i: int) -> bool:
        return self._references(i) == self._idle

    def _references(self, i: int) -> int:
        """Count what holds array ``i``; a tensor or a view is one more than what this class has."""
        return sys.getrefcount(self._arrays[i])


def gather_groups(
    groups: NDArray[np.int64], gather: Callable[[int, NDArray[np.int64] | slice], Samples], pool: ArrayPool
) -> Samples:
    """Gather samples of several ``groups``; ``gather`` returns those of one, given its number and their rows."""
    distinct = np.unique(groups).tolist()
    if len(distinct) == 1:
        return gather(distinct[0], slice(None))
    samples = Samples()
    for group in distinct:
        rows = np.flatnonzero(groups == group)
        for name, array in gather(group, rows).items():
            if name not in samples:
                samples[name] = pool.take(len(groups), *array.shape[1:], dtype=array.dtype)
            samples[name][rows] = array
    return samples


class Batch(dict[str, torch.Tensor]):
    """B samples: a tensor ``(B, ...)`` by name, in the order in which a network gets them."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``; from pinned memory the copy does not block."""
        if next(iter(self.values())).device == device:
            return self
        return Batch({name: tensor.to(device, non_blocking=True) for name, tensor in self.items()})

    def split(self, num_samples: int) -> "list[Batch]":
        """Return the samples, so many at a time; they share the memory."""
        parts = zip(*(tensor.split(num_samples) for tensor in self.values()), strict=True)
        return [Batch(zip(self, part, strict=True)) for part in parts]

    def pin_memory(self) -> "Batch":
        return Batch({name: tensor.pin_memory() for name, tensor in self.items()})

    def padded(self, num_steps: int, num_samples: int, *, num_kept: int, filling: Mapping[str, int | float]) -> "Batch":
        """Return the first ``num_kept`` samples of each step, filled up to ``num_samples`` with ``filling``."""
        if num_kept == num_samples:
            return self

        def fill(tensor: torch.Tensor, value: int | float) -> torch.Tensor:
            whole = tensor.new_full((num_steps, num_samples, *tensor.shape[1:]), value)
            whole[:, :num_kept] = tensor.view(num_steps, -1, *tensor.shape[1:])[:, :num_kept]
            return whole.flatten(0, 1)

        return Batch({name: fill(tensor, filling[name]) for name, tensor in self.items()})


def build_batch(samples: Samples) -> Batch:
    """Return samples as tensors that share their memory."""
    return Batch({name: torch.from_numpy(array) for name, array in samples.items()})
